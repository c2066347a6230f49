"""FLOPs and link traffic of one training step per device. Predictions, made without a compiler.

The program is the one of lct.train.step: weights sharded over fsdp and sequence and gathered twice per
micro-batch, layers under a remat policy, attention split over the sequence axis by a strategy. The counts
follow from the program and are tested against its compiled text. Memory: buffers.py. Seconds: timing.py.

Letters as in lct.sharding; c: tokens of a row on one device.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

from lct.models import llama, lora
from lct.models.flops import layer_matmul_params, train_flops, visible_pairs
from lct.models.llama import LlamaConfig, Memory
from lct.models.lora import Adapter
from lct.models.memory import REMAT
from lct.ops import strategies

WIDTH = {'bfloat16': 2, 'float32': 4}
FLOAT32 = 4
INT8_WIDTH = 17 / 16  # bytes of a weight in lct.ops.int8_blocks
TOKEN_TAGS = 8  # bytes: the int32 position and segment that accompany every key


@dataclasses.dataclass(frozen=True)
class Step:
    """The work of one optimizer step, and the mesh that it runs on.

    mesh: degrees of data, fsdp, sequence and tensor.
    batch_size: rows of seq_len tokens in a micro-batch. accumulation: micro-batches per step.
    dtype: of the stored parameters; memory.dtype, if given, is the dtype of the computation.
    """

    config: LlamaConfig
    mesh: tuple[int, int, int, int]
    seq_len: int
    batch_size: int = 1
    accumulation: int = 1
    memory: Memory = Memory(dtype='bfloat16')
    dtype: str = 'float32'
    layout: str = 'zigzag'

    def check(self) -> None:
        """Refuse a step that the mesh cannot run.

        Raises:
          ValueError: with the reason.
        """
        config, attention = self.config, self.memory.attention
        data, fsdp, ring, tensor = self.mesh
        llama.check_mesh(config, self.mesh)
        strategies.check(attention, ring, config.num_heads // tensor, config.num_kv_heads // tensor)
        passes, chunks = self.memory.query_passes, self.memory.ffn_chunks
        divisor = math.lcm(2 * ring * passes, ring * chunks)
        if self.seq_len % divisor:
            raise ValueError(f'seq_len {self.seq_len} is not a multiple of {divisor}: each of {ring} devices '
                             f'holds two stretches of the sequence and {chunks} ffn_chunks'
                             f'{f", in {passes} query_passes" * (passes > 1)}')
        if self.batch_size % (data * fsdp):
            raise ValueError(
                f'batch_size {self.batch_size} is not a multiple of data * fsdp = {data} * {fsdp}')

    @property
    def devices(self) -> int:
        """Number of devices of the mesh."""
        return math.prod(self.mesh)

    @property
    def rows(self) -> int:
        """Rows of a micro-batch on one device."""
        return self.batch_size // (self.mesh[0] * self.mesh[1])

    @property
    def shard(self) -> int:
        """c, tokens of one row on one device."""
        return self.seq_len // self.mesh[2]

    @property
    def local(self) -> int:
        """Tokens of a micro-batch on one device."""
        return self.rows * self.shard

    @property
    def tokens(self) -> int:
        """Tokens of the whole step, all devices."""
        return self.batch_size * self.accumulation * self.seq_len

    @property
    def width(self) -> int:
        """Bytes of an activation, and of a weight in use or in transfer."""
        return WIDTH[self.memory.dtype or self.dtype]

    @property
    def stored_width(self) -> int:
        """Bytes of a parameter and of each of its moments."""
        return WIDTH[self.dtype]

    @property
    def node(self) -> tuple[int, int]:
        """Neighbours on the sequence axis that the strategy treats as one node, and the number of nodes."""
        return self.memory.attention.nodes(self.mesh[2])

    @property
    def keeps_attention(self) -> bool:
        """Whether attention's output is kept, so that the backward does not run its forward again."""
        return REMAT[self.memory.remat].attention_once


# ---------------------------------------------------------------------------------------------------
# FLOPs
# ---------------------------------------------------------------------------------------------------


# a search calls them thousands of times
num_params, num_trained = functools.cache(llama.num_params), functools.cache(lora.num_trained)


def model_flops(step: Step, adapter: Adapter | None = None) -> int:
    """FLOPs that the model needs for the whole step on all devices: the numerator of the utilisation.

    adapter: trained in place of all weights.
    """
    pairs = visible_pairs(step.seq_len, step.config.window) * step.batch_size * step.accumulation
    return train_flops(step.config, step.tokens, pairs, adapter)


def busiest_pairs(step: Step, causal: bool = True) -> float:
    """Pairs of one row on the critical path: those of the busiest device at each ring step, summed.

    causal: False for a ring that skips no pair.
    """
    ring, window = step.mesh[2], step.config.window
    heads_split = step.node[0] if step.memory.attention.facts.splits_heads else 1
    shards, length = ring // heads_split, step.shard * heads_split  # blocks in the ring, and tokens of each
    if not causal:
        pairs = length * step.seq_len
    elif step.layout == 'contiguous' and window is None:
        # at every ring step but the first, some device attends to all of the block that it holds
        pairs = length * (length + 1) // 2 + (shards - 1) * length**2
    else:
        pairs = visible_pairs(step.seq_len, window) / shards
        if step.layout == 'striped':  # the diagonal tiles of every block are computed in full
            pairs += length * min(step.memory.attention.chunks.key, length) / 2 * shards
    return pairs / heads_split


class Work(NamedTuple):
    """FLOPs of one device and step, recomputation included."""

    matmul: float
    attention_forward: float
    attention_backward: float

    @property
    def total(self) -> float:
        return sum(self)


def work(step: Step, causal: bool = True, adapter: Adapter | None = None) -> Work:
    """The Work of a step; causal as in busiest_pairs, adapter as in model_flops.

    Under remat the backward of a layer runs its products again, except the last one, w_down, whose result is
    not used. 'attention' also spares the products before the attention, 'dots' all products. Attention: 4 N H
    per pair forward and 10 N H backward (two products and five).
    """
    config, tensor = step.config, step.mesh[3]
    attention, ffn = layer_matmul_params(config)
    remat = step.memory.remat
    recomputed = attention + ffn * 2 / 3
    if remat == 'attention':
        recomputed = config.embed_dim * config.head_dim * config.num_heads + ffn * 2 / 3
    if remat in ('dots', 'none'):  # chunks of the FFN are always recomputed
        recomputed = ffn * 2 / 3 if step.memory.ffn_chunks > 1 else 0
    layer = 6 * (attention + ffn) + 2 * recomputed
    micro = step.accumulation
    per_token = config.num_layers * layer + 6 * config.vocab_size * config.embed_dim
    per_token -= _spared(config, adapter)
    pairs = busiest_pairs(step, causal) * step.rows * micro
    scores = config.num_layers * config.num_heads * config.head_dim * pairs / tensor
    return Work(per_token * step.local * micro / tensor, 4 * scores * (2 - step.keeps_attention), 10 * scores)


@functools.cache
def _spared(config, adapter):
    """FLOPs of a token that are not needed because an adapter, or None, is trained."""
    return train_flops(config, 1, 0) - train_flops(config, 1, 0, adapter)


# ---------------------------------------------------------------------------------------------------
# Bytes
# ---------------------------------------------------------------------------------------------------


class Transfer(NamedTuple):
    """Bytes that one device sends in one step.

    axis: of the mesh.
    flow: 'ring' to one neighbour, or 'collective' among group devices that are stride apart.
    behind: 'forward' or 'backward' if the transfer can overlap with that attention, '' if it is exposed.
    """

    name: str
    axis: str
    flow: str
    stride: int
    group: int
    bytes: float
    behind: str


def transfers(step: Step, adapter: Adapter | None = None) -> list[Transfer]:
    """Every Transfer of a step that sends any bytes; adapter as in model_flops."""
    found = [*_attention_transfers(step), *_weight_transfers(step, adapter), *_tensor_transfers(step)]
    return [t for t in found if t.bytes]


def _attention_transfers(step):
    """Transfers of keys and values. The forward of a ring of n sends n - 1 blocks. The backward, which cuts a
    block in two, sends n - 1/2 of them and as many of float32 dk and dv. For gathers see the ops. Every pass
    over the queries sends all of that again."""
    config, tensor = step.config, step.mesh[3]
    ring, (node, nodes) = step.mesh[2], step.node
    if ring == 1:
        return []
    times = config.num_layers * step.accumulation
    kv_heads = config.num_kv_heads / tensor
    forwards = 2 - step.keeps_attention
    sent_tokens = step.local * step.memory.query_passes
    values = 2 * sent_tokens * kv_heads * config.head_dim
    strategy = step.memory.attention.facts
    copies = max(node / kv_heads, 1) if strategy.splits_heads else 1
    block = values * copies * step.width + TOKEN_TAGS * sent_tokens  # one block of keys and values
    grads = values * copies * FLOAT32

    def ring_passes(name, size, stride, passes):
        """Both passes of a ring of `size` devices that are `stride` apart on the sequence axis."""
        if size == 1:
            return []
        return [Transfer(f'{name} forward', 'sequence', 'ring', stride * tensor, size,
                         times * passes * forwards * (size - 1) * block, 'forward'),
                Transfer(f'{name} backward', 'sequence', 'ring', stride * tensor, size,
                         times * passes * (size - 0.5) * (block + grads), 'backward')]

    rings = ring_passes('ring of nodes' if strategy.two_level else 'ring', nodes, node, 1)
    others = (node - 1) / node
    collective = functools.partial(
        Transfer, axis='sequence', flow='collective', stride=tensor, group=node, behind='')
    if strategy.splits_heads:  # q, out and their gradients; k, v and theirs
        heads = step.local * config.num_heads / tensor * config.head_dim
        passes = forwards + 1
        sent = (2 * heads + values * copies) * step.width * others * passes
        return [collective('all-to-all', bytes=times * sent), *rings]
    if not strategy.gathers:
        return [*ring_passes('ring in the node', node, 1, nodes), *rings]
    # in a single gather, the one of the second forward serves the backward too
    gathers = forwards + (nodes > 1 or step.keeps_attention)
    sent = (gathers * block + grads) * (node - 1) * nodes
    return [collective('gather of keys, scatter of their gradients', bytes=times * sent), *rings]


def _weight_transfers(step, adapter):
    """Weights of a micro-batch are gathered for the forward and again for the backward, in the dtype of the
    computation. Their float32 gradients are scattered to the owners of the weights; with a data axis the
    compilers all-reduce them in full. Those of the FFN and of wo can overlap with attention. Frozen weights
    have none; in 8 bits they are gathered so."""
    config = step.config
    data, fsdp, ring, tensor = step.mesh
    attention, ffn = layer_matmul_params(config)
    late = config.num_layers * (ffn + config.embed_dim * config.num_heads * config.head_dim)
    early = config.num_layers * (attention + ffn) - late
    table = config.vocab_size * config.embed_dim
    gathers = 1 + (step.memory.remat != 'none')
    width = INT8_WIDTH if adapter and adapter.quantized else step.width

    def gather(name, parameters, behind):
        group = fsdp * ring
        size = parameters * width * step.accumulation / tensor
        return Transfer(name, 'fsdp+sequence', 'collective', tensor, group, (group - 1) / group * size,
                        behind)

    def reduce(name, parameters, behind):
        group = data * fsdp * ring
        size = parameters * FLOAT32 * step.accumulation / tensor
        axis, times = ('fsdp+sequence', 1) if data == 1 else ('data+fsdp+sequence', 2)
        return Transfer(name, axis, 'collective', tensor, group, times * (group - 1) / group * size, behind)

    gathered = [
        gather('weights behind attention, forward', late, 'forward'),
        gather('weights behind attention, backward', (gathers - 1) * late, 'backward'),
        gather('weights, exposed', gathers * early + 2 * table, ''),
    ]
    if adapter:
        return [*gathered, reduce('gradients of adapters', num_trained(config, adapter), '')]
    return [
        *gathered,
        reduce('gradients behind attention', late, 'backward'),
        reduce('gradients, exposed', early + (1 + step.width / FLOAT32) * table, ''),
    ]


def _tensor_transfers(step):
    """All-reduces of [tokens, D] in float32: after wo and w_down in the forward, after wo again under remat,
    and for the inputs of q, k, v, gate and up in the backward."""
    tensor = step.mesh[3]
    reduces = 7 + (step.memory.remat not in ('none', 'dots'))
    size = step.local * step.config.embed_dim * FLOAT32 * step.accumulation
    return [Transfer('partial sums', 'tensor', 'collective', 1, tensor,
                     2 * (tensor - 1) / tensor * size * reduces * step.config.num_layers, '')]
