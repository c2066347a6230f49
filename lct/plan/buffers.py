"""Device memory of one training step, by buffer. Predictions, made without a compiler.

A device always holds its share of weights and moments, what the remat policy saves from forward to backward,
and the buffers of the current phase: the loss, which needs the whole head; the backward of a layer, which
needs that layer's weights and workspace; or the update. The peak is the largest phase on top of what stays.

Sizes follow from the program, except for the constants below, which were fitted to compiled programs:
experiments/checks/check_plan_memory.py lists those programs and the ones that were held out.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lct import sharding
from lct.models import llama, lora
from lct.models.config import LlamaConfig
from lct.models.flops import layer_matmul_params, matmul_sizes
from lct.models.memory import REMAT
from lct.plan.cost import FLOAT32, INT8_WIDTH, WIDTH, Step, num_trained

# Fitted to programs compiled for CUDA, in float32 arrays of [tokens, D]: the working set of the backward of a
# layer beside that of a chunk of the FFN, that is the residual stream, q, k, v, out and their gradients.
# Fused kernels need less than xla, and adapters less than all weights, whose gradients need every input.
WORK, WORK_FUSED, WORK_ADAPTER = 9, 6.2, 5.2
# The least, where the compiler schedules for memory: the larger of attention's and of the residual stream's
# beside the FFN's, which follow each other. One device with a fused kernel has no transfers to overlap and
# needs no more.
LEAST, LEAST_FFN = 4.4, 1
# Sets of k, v and float32 dk, dv that these strategies hold, or their like in copies, beside those of a ring.
MORE_SETS = {'double_ring': 1.5, 'all_to_all': 1, 'all_to_all_ring': 1}
# The compiler schedules for memory beyond this share of a GPU's. What is kept on the host for the backward
# counts as on the device; state that comes from the host does not.
SCHEDULED = 0.77
# In bytes per element of [tokens of a chunk, F]: gate, up, their product and the gradients of the three.
WORK_FFN = 14
# Elements per token that a layer keeps without remat: multiples of D (float32 norms, residuals, out), of F.
KEPT_D, KEPT_F = 16, 5
# Fitted to programs compiled for TPU: heap fragmentation, as a multiple of the float32 gradient of an
# embedding that is not the head.
FRAGMENTS = 1.25
BACKWARD, LAYER, FFN = 'backward of a layer', 'work on a layer', 'work on a chunk of the FFN'
BATCH = 20  # bytes of a token in the batch: five arrays of 32 bits


class Buffers(NamedTuple):
    """Bytes by name.

    stays: held all the time. saved: from forward to backward. phases: {phase: {name: bytes}}, one at a time.
    host: in the memory of the host.
    """

    stays: dict[str, float]
    saved: dict[str, float]
    phases: dict[str, dict[str, float]]
    host: dict[str, float]

    @property
    def phase(self) -> str:
        """The phase with the largest memory."""
        return max(self.phases, key=self.in_phase)

    def in_phase(self, name: str) -> float:
        """Bytes that are held during a phase, without those that stay."""
        kept = 0 if name == 'update' else sum(self.saved.values())
        return kept + sum(self.phases[name].values())

    @property
    def peak(self) -> float:
        """Bytes of device memory at the peak."""
        return sum(self.stays.values()) + self.in_phase(self.phase)

    def at_peak(self) -> dict[str, float]:
        """Bytes by name of all buffers that exist at the peak."""
        kept = {} if self.phase == 'update' else self.saved
        return {**self.stays, **kept, **self.phases[self.phase]}


def buffers(step: Step, platform: str = 'gpu') -> Buffers:
    """The Buffers of a Step; platform: 'gpu' or 'tpu', as Hardware.platform."""
    config = step.config
    tensor, share = step.mesh[3], share_of(step)
    stays = {
        'weights': share * step.stored_width,
        'moments of AdamW': 2 * share * FLOAT32,
        'batch': BATCH * step.local * step.accumulation,
    }
    if step.accumulation > 1:
        stays['gradients so far, float32'] = share * FLOAT32
    shared = config.tie_embeddings and step.width == step.stored_width  # the gathered head serves for both
    if step.width < FLOAT32 and not shared:  # gathered as stored; a loop keeps the head as used
        stays['embedding, gathered'] = config.vocab_size * config.embed_dim * step.stored_width / tensor
    if step.accumulation > 1 and step.width < step.stored_width and not REMAT[step.memory.remat].on_host:
        stays['head, cast for all micro-batches'] = config.vocab_size * config.embed_dim * step.width / tensor
    kept, host = saved(step)
    if platform == 'tpu' and not config.tie_embeddings:
        kept['fragments'] = FRAGMENTS * config.vocab_size * config.embed_dim * FLOAT32 / tensor
    phases = {
        'loss': _loss(step, platform),
        BACKWARD: {'gradients': _gradients(step, share), **_layer(step, platform)},
        'update': {'gradients, float32': share * FLOAT32},
    }
    return Buffers(stays, kept, phases, host)


def with_adapter(needed: Buffers, step: Step, adapter: lora.Adapter) -> Buffers:
    """The Buffers of a Step that trains a lora.Adapter, from those without.

    Frozen weights have neither moments nor gradients. Those in 8 bits stay so until they are used: a layer,
    or the head, is held in the dtype of the computation too, and of the embedding only the rows of the tokens
    are.
    """
    config, shards = step.config, step.devices / step.mesh[0]
    trained = num_trained(config, adapter) / shards
    width = INT8_WIDTH if adapter.quantized else WIDTH[adapter.frozen_dtype or step.dtype]
    stays = {name: size for name, size in needed.stays.items() if 'moment' not in name}
    stays['weights'] = frozen_bytes(config, adapter, step.dtype) / shards + trained * step.stored_width
    stays['moments of AdamW'] = 2 * trained * FLOAT32
    if step.accumulation > 1:
        stays['gradients so far, float32'] = trained * FLOAT32
    if 'embed' not in adapter.also_train:
        gathered = config.vocab_size * config.embed_dim * width / step.mesh[3]
        stays['embedding, gathered'] = gathered if shards > 1 else 0
    phases = {name: dict(sizes) for name, sizes in needed.phases.items()}
    if ('embed' if config.tie_embeddings else 'lm_head') not in adapter.also_train:
        for name in ('gradient of the head, float32', 'gradient of the head, one chunk'):
            del phases['loss'][name]
        stays.pop('head, cast for all micro-batches', None)
    layer = phases[BACKWARD]
    # that of the embedding alone is computed after the last layer's
    early = 0 if config.tie_embeddings or 'embed' not in adapter.also_train else (
        config.vocab_size * config.embed_dim / shards)
    layer['gradients'] = (trained - early) * FLOAT32
    layer['gradients of a layer, float32'] *= _trained_share(config, adapter)
    layer[LAYER] = WORK_ADAPTER * _array(step) + _whole(step)
    if adapter.quantized:
        layer['weights of a layer, gathered'] *= (step.width + INT8_WIDTH) / (2 * step.width)
    phases['update'] = {'gradients, float32': trained * FLOAT32}
    return needed._replace(stays=stays, phases=phases)


@functools.cache
def frozen_bytes(config: LlamaConfig, adapter: lora.Adapter, dtype: str) -> int:
    """Bytes of the frozen weights of a model, scales included; dtype: of the trained weights."""
    return sum(math.prod(x.shape) * x.dtype.itemsize
               for x in jax.tree.leaves(lora.abstract(config, adapter, jnp.dtype(dtype))[1]))


def _trained_share(config, adapter):
    """The share of a layer's matrices that an adapter trains in full."""
    sizes = {name: size for name, size in matmul_sizes(config).items() if name not in ('embed', 'lm_head')}
    return sum(size for name, size in sizes.items() if name in adapter.also_train) / sum(sizes.values())


def scheduled(needed: Buffers, step: Step, memory: float) -> Buffers:
    """The Buffers of a Step where the compiler schedules for the memory of a GPU, from those without.

    memory: bytes of a device.
    """
    total = sum(needed.stays.values()) + needed.in_phase(BACKWARD) + sum(saved(step)[1].values())
    backward = needed.phases[BACKWARD]
    work, least = backward[LAYER], _least(step, backward[FFN])
    less = max(min(work, least), work - max(0.0, total - SCHEDULED * memory))
    return needed._replace(phases={**needed.phases, BACKWARD: {**backward, LAYER: less}})


def _work(step, ffn, platform):
    """Bytes of the working set of a layer where the compiler has memory to spare, ffn those of the FFN."""
    if platform == 'tpu' or step.width == FLOAT32 or step.memory.attention.kernel == 'xla':
        return WORK * _array(step) + _whole(step)
    return WORK_FUSED * _array(step) + _whole(step) if step.mesh[2] > 1 else _least(step, ffn)


def _least(step, ffn):
    """The least of _work."""
    return max(LEAST * _array(step) - ffn, LEAST_FFN * _array(step)) + _whole(step)


def _array(step):
    """Bytes of a float32 array of [tokens, D] on one device, the tokens of one pass over the queries."""
    return step.local / step.memory.query_passes * step.config.embed_dim * FLOAT32


def _more_sets(step):
    """Bytes of what a strategy holds of keys and values beside what a ring does."""
    values = 2 * step.local * step.config.num_kv_heads / step.mesh[3] * step.config.head_dim
    return MORE_SETS.get(step.memory.attention.strategy, 0) * values * (step.width + FLOAT32)


def _whole(step):
    """Bytes of a layer's arrays of all tokens, beside those of a pass over the queries if there are more: its
    input (unless that is in transfer) and gradient, k, v, and float32 dk and dv, of which a ring also holds
    halves."""
    if step.memory.query_passes == 1:
        return 0
    values = 2 * step.local * step.config.num_kv_heads / step.mesh[3] * step.config.head_dim
    keys, grads = (2.5, 2) if step.mesh[2] > 1 else (1, 1)
    hidden = step.local * step.config.embed_dim * step.width
    hidden *= 1 if REMAT[step.memory.remat].on_host else 2
    return hidden + values * (keys * step.width + grads * FLOAT32)


@functools.cache
def _sizes_by_axes(config):
    """{the mesh axes that parameters are split over: their number}."""
    sizes = {}
    shapes, specs = (jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, tuple))
                     for tree in (llama.shapes(config), llama.specs(config)))
    for shape, spec in zip(shapes, specs, strict=True):
        axes = tuple(jax.tree.leaves(tuple(spec)))
        sizes[axes] = sizes.get(axes, 0) + math.prod(shape)
    return sizes


def share_of(step: Step) -> float:
    """Parameters that one device holds."""
    degrees = dict(zip(sharding.AXES, step.mesh))
    return sum(size / math.prod(degrees[axis] for axis in axes)
               for axes, size in _sizes_by_axes(step.config).items())


def _gradients(step, share):
    """Gradients of all layers, in the dtype of the weights."""
    return share * step.stored_width


def saved(step: Step) -> tuple[dict[str, float], dict[str, float]]:
    """What the remat policy keeps, on the device and on the host: bytes by name."""
    config = step.config
    remat, tensor = step.memory.remat, step.mesh[3]
    tokens = step.local * config.num_layers  # of all layers
    inputs = tokens * config.embed_dim * step.width
    heads = config.num_heads / tensor * config.head_dim
    kv_heads = config.num_kv_heads / tensor * config.head_dim
    lse = config.num_heads / tensor * FLOAT32
    kept = {'layer inputs': inputs}
    if remat == 'attention':
        kept['q, k, v, out, lse'] = tokens * (2 * (heads + kv_heads) * step.width + lse)
    if remat in ('attention_output', 'offload_attention_output'):
        kept['out, lse'] = tokens * (heads * step.width + lse)
    if REMAT[remat].on_host:
        return _in_transfer(step, kept), kept
    if remat in ('full', 'attention', 'attention_output'):
        return kept, {}
    if remat == 'dots':
        results = heads + 2 * kv_heads + config.embed_dim
        if step.memory.ffn_chunks == 1:
            results += 2 * config.mlp_dim / tensor
        return {**kept, 'results of products, float32': tokens * results * FLOAT32}, {}
    elements = KEPT_D * config.embed_dim + 2 * (heads + kv_heads)
    if step.memory.ffn_chunks == 1:
        elements += KEPT_F * config.mlp_dim / tensor
    return {'activations of all layers': tokens * elements * step.width}, {}


def _in_transfer(step, kept):
    """Bytes by name of what is on its way from the host to one layer and the next. Passes over the queries
    leave the next layer's input where it is: the compiler has no memory to hide its transfer in."""
    if step.memory.query_passes == 1:
        return {'layer inputs in transfer': 2 * kept['layer inputs'] / step.config.num_layers}
    times = {'layer inputs': 1, 'out, lse': 2 if step.mesh[2] > 1 else 1}
    return {f'{name} in transfer': times[name] * size / step.config.num_layers for name, size in kept.items()}


def _loss(step, platform):
    """The gathered head, its gradient summed over chunks and of one chunk, and the hidden states."""
    config, tensor = step.config, step.mesh[3]
    head = config.vocab_size * config.embed_dim / tensor
    chunk = min(step.memory.loss_chunk, step.local) * config.vocab_size / tensor
    out = {
        'head, gathered': head * step.width,
        'gradient of the head, float32': head * FLOAT32,
        'gradient of the head, one chunk': head * FLOAT32,
        'logits': chunk * (step.width if step.width < FLOAT32 else 2 * FLOAT32),
        'hidden states and their gradient': 2 * step.local * config.embed_dim * step.width,
    }
    if step.width == FLOAT32 or (platform == 'tpu' and config.tie_embeddings):
        out['head, transposed'] = head * step.width
    return out


def _layer(step, platform):
    """The backward of one layer: gathered weights, their gradients, working set, gathered keys of a node."""
    config, tensor = step.config, step.mesh[3]
    weights = sum(layer_matmul_params(config)) / tensor
    chunk = step.rows * step.shard / max(step.memory.ffn_chunks, step.memory.query_passes)
    ffn = WORK_FFN / 2 * step.width * chunk * config.mlp_dim / tensor
    node, _ = step.node
    out = {
        'weights of a layer, gathered': 2 * weights * step.width,
        'gradients of a layer, float32': weights * FLOAT32,
        LAYER: _work(step, ffn, platform),
        FFN: ffn,
    }
    if more := _more_sets(step):
        out['keys and values exchanged, their gradients'] = more
    if step.memory.attention.facts.gathers:
        keys = 2 * node * step.local * config.num_kv_heads / tensor * config.head_dim
        out['keys and values of a node, their gradients'] = keys * (step.width + FLOAT32)
    return out
