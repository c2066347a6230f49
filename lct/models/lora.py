"""LoRA (Hu et al. 2021, arXiv 2106.09685) on the attention projections, as LongLoRA (Chen et al. 2023, arXiv
2309.12307) trains it for longer contexts: low-rank adapters on wq, wk, wv and wo, the norms trained in full
and, where its many parameters can be afforded, the embedding too. Everything else is frozen.

Letters as in llama, and R the rank. A weight W acts as W + alpha / R * down @ up, and up starts at zero.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from lct import sharding
from lct.models import int8_weights, llama
from lct.models.config import LlamaConfig
from lct.models.memory import Memory, scan_layers
from lct.models.offload import fetch_rest
from lct.ops import rope
from lct.ops.cross_entropy import cross_entropy_sum
from lct.ops.norms import rms_norm

# projection: (letters of its input, letters of its output)
ADAPTED = {'wq': ('D', 'NH'), 'wk': ('D', 'KH'), 'wv': ('D', 'KH'), 'wo': ('NH', 'D')}
TRAINABLE = (  # in full
    'embed', 'attn_norm', 'mlp_norm', 'w_gate', 'w_up', 'w_down', 'final_norm', 'lm_head', 'q_norm', 'k_norm',
    'q_bias', 'k_bias', 'v_bias', 'out_bias', 'gate_bias', 'up_bias', 'down_bias')


@dataclasses.dataclass(frozen=True)
class Adapter:
    """The trained parameters of a model that is otherwise frozen.

    rank, alpha: of the adapters; their product is scaled by alpha / rank. LongLoRA uses 8 and 16.
    also_train: parameters trained in full, by their names in llama.Params; LongLoRA trains the norms and
      the embedding. Names that a family does not have are passed over.
    frozen_dtype: of the frozen weights, best the dtype of the activations; None for the dtype of the trained
      weights. 'int8' holds the matrices as blocks of 32 with a scale each (GGUF's Q8_0, 17/16 bytes a
      weight) and dequantizes a layer at a time, as QLoRA (Dettmers et al. 2023, arXiv 2305.14314) does.
    seed: of the adapters' initial values.

    Share of Llama-3 8B (8,030,261,248) that is trained at rank 8: adapters 6,815,744 and norms 266,240,
    0.09%; with the embedding 6.6%, because the vocabulary is four times as large as in the paper, which
    trained Llama-2.

    Raises:
      ValueError: for a rank, an alpha, a parameter name or a dtype that does not exist.
    """

    rank: int = 8
    alpha: float = 16.0
    also_train: tuple[str, ...] = ('attn_norm', 'q_norm', 'k_norm', 'mlp_norm', 'final_norm')
    frozen_dtype: str | None = None
    seed: int = 0

    def __post_init__(self):
        if type(self.rank) is not int or self.rank < 1:
            raise ValueError(f'adapter rank {self.rank!r} must be a positive integer, for example 8')
        if not 0 < self.alpha < math.inf:
            raise ValueError(f'adapter alpha {self.alpha!r} must be a positive number, for example 16')
        for name in self.also_train:
            if name not in TRAINABLE:
                reason = 'has an adapter' if name in ADAPTED else 'is not a parameter'
                raise ValueError(f'adapter also_train: {name!r} {reason}; choose from {", ".join(TRAINABLE)}')
        if self.frozen_dtype not in (None, 'float32', 'bfloat16', 'int8'):
            raise ValueError(
                f"adapter frozen_dtype {self.frozen_dtype!r} must be 'float32', 'bfloat16', 'int8' or None")

    @property
    def quantized(self) -> bool:
        """Whether the frozen weights are held in 8 bits."""
        return self.frozen_dtype == 'int8'

    def check(self, config: LlamaConfig, mesh: tuple[int, ...], memory: Memory) -> None:
        """Check that a model can be trained with this adapter on a mesh, given by its four degrees.

        Raises:
          ValueError: for weights in 8 bits whose blocks straddle devices, or whose dequantized layers would
            all be kept for the backward pass.
        """
        if not self.quantized:
            return
        int8_weights.check(config, mesh)
        if memory.remat == 'none':
            raise ValueError("adapter frozen_dtype 'int8' with remat 'none' would keep the dequantized "
                             "weights of all layers for the backward pass; use remat 'dots'")


class LowRank(struct.PyTreeNode):
    """One adapter, which adds scale * down @ up to its weight."""

    down: Any  # [L, D, R] of wq, wk, wv; [L, N, H, R] of wo
    up: Any  # [L, R, N, H] of wq, [L, R, K, H] of wk and wv, [L, R, D] of wo
    scale: float = struct.field(pytree_node=False)  # alpha / R


class Adapters(struct.PyTreeNode):
    """The adapters of the attention projections."""

    wq: LowRank
    wk: LowRank
    wv: LowRank
    wo: LowRank


class Trained(struct.PyTreeNode):
    """The parameters that the optimizer updates. whole: llama.Params with None for every frozen leaf."""

    adapters: Adapters
    whole: llama.Params


def adapter_table(adapter: Adapter) -> Adapters:
    """Adapters of llama.ParamInfo: letters, and initial standard deviations in units of 1 / sqrt(fan-in)."""
    def row(reads, writes):
        scale = adapter.alpha / adapter.rank
        return LowRank(llama.ParamInfo(f'L{reads}R', 1.0), llama.ParamInfo(f'LR{writes}', 0.0), scale)

    return Adapters(**{name: row(*letters) for name, letters in ADAPTED.items()})


def partition(params: llama.Params, adapter: Adapter) -> tuple[llama.Params, llama.Params]:
    """(trained in full, frozen): params twice, each with None where the other holds the leaf.

    Raises:
      ValueError: for a head that is to be trained but is tied to the embedding.
    """
    if 'lm_head' in adapter.also_train and params.lm_head is None:
        raise ValueError("adapter also_train: 'lm_head' is the embedding in this model; name 'embed' instead")

    def keep(trained):
        return jax.tree_util.tree_map_with_path(
            lambda path, x: x if (path[-1].name in adapter.also_train) == trained else None, params,
            is_leaf=int8_weights.is_quantized)

    return keep(True), keep(False)


def combine(whole: llama.Params, frozen: llama.Params) -> llama.Params:
    """The inverse of partition."""
    return jax.tree.map(lambda a, b: b if a is None else a, whole, frozen, is_leaf=lambda x: x is None)


def abstract(config: LlamaConfig, adapter: Adapter, dtype: Any = jnp.float32) -> tuple[Trained, llama.Params]:
    """(Trained, frozen) of ShapeDtypeStructs, sharded on the current concrete mesh if there is one."""
    size = llama.dims(config) | {'R': adapter.rank}
    adapters = jax.tree.map(lambda info: llama.abstract_param(info, size, dtype), adapter_table(adapter),
                            is_leaf=llama.is_param_info)
    whole, frozen = partition(llama.abstract(config, dtype), adapter)
    if adapter.quantized:
        return Trained(adapters, whole), int8_weights.map_named(int8_weights.abstract, frozen)
    frozen = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, adapter.frozen_dtype or dtype, sharding=x.sharding), frozen)
    return Trained(adapters, whole), frozen


def num_trained(config: LlamaConfig, adapter: Adapter) -> int:
    """The exact number of trained parameters."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract(config, adapter)[0]))


def num_low_rank(config: LlamaConfig, adapter: Adapter) -> int:
    """The number of parameters in the adapters alone."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract(config, adapter)[0].adapters))


def init(config: LlamaConfig, adapter: Adapter, dtype: Any = jnp.float32) -> Adapters:
    """Adapters that change nothing yet, on the current mesh: down normal, up zero."""
    target = abstract(config, adapter, dtype)[0].adapters

    @functools.partial(jax.jit, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, target))
    def sample(key):
        leaves, tree = jax.tree.flatten(target)
        rows = jax.tree.leaves(adapter_table(adapter), is_leaf=llama.is_param_info)
        keys = jax.random.split(key, len(leaves))
        return tree.unflatten([
            info.stddev * math.prod(leaf.shape[1:-1]) ** -0.5 * jax.random.normal(key, leaf.shape, dtype)
            for leaf, info, key in zip(leaves, rows, keys, strict=True)])

    return sample(jax.random.key(adapter.seed))


def freeze(params: llama.Params, adapter: Adapter) -> tuple[llama.Params, llama.Params]:
    """(trained in full, frozen) of params, the frozen leaves in adapter.frozen_dtype. Those that freezing has
    already quantized are kept."""
    whole, frozen = partition(params, adapter)
    if adapter.quantized:
        return whole, int8_weights.map_named(int8_weights.quantize, frozen)
    return whole, jax.tree.map(lambda x: x.astype(adapter.frozen_dtype or x.dtype), frozen)


def freezer(adapter: Adapter) -> Callable[[str, jax.Array], Any]:
    """A function (name, leaf) -> leaf that quantizes the leaves to freeze, one by one as they are loaded."""
    return lambda name, x: x if name in adapter.also_train else int8_weights.quantize(name, x)


@jax.jit
def merge(trained: Trained, frozen: llama.Params) -> llama.Params:
    """The equivalent llama.Params without adapters; the merged weights are float32, others that were in 8
    bits in the dtype of the trained weights."""
    params = int8_weights.dequantize(combine(trained.whole, frozen), trained.adapters.wq.down.dtype)

    def merged(name):
        reads, writes = ADAPTED[name]
        weight, adapter = getattr(params.layers, name), getattr(trained.adapters, name)
        spec = None if sharding.current_mesh() is None else sharding.weight_spec(f'L{reads}{writes}')
        product = jnp.einsum(f'L{reads}R,LR{writes}->L{reads}{writes}', adapter.down.astype(jnp.float32),
                             adapter.up.astype(jnp.float32), precision='highest', out_sharding=spec)
        return weight.astype(jnp.float32) + adapter.scale * product

    return params.replace(layers=params.layers.replace(**{name: merged(name) for name in ADAPTED}))


# ---------------------------------------------------------------------------------------------------
# Forward: llama's block and scan, with adapters beside the projections
# ---------------------------------------------------------------------------------------------------


def low_rank(name: str, x: jax.Array, adapters: Adapters) -> jax.Array:
    """The output that an adapter adds to its projection: [B, T, D] -> [B, T, N, H] for wq, [B, T, K, H] for
    wk and wv; [B, T, N, H] -> [B, T, D] for wo."""
    (reads, writes), adapter = ADAPTED[name], getattr(adapters, name)
    inner = sharding.einsum(f'BT{reads},{reads}R->BTR', x, adapter.down)
    return adapter.scale * sharding.einsum(f'BTR,R{writes}->BT{writes}', inner, adapter.up)


def linear(name: str, x: jax.Array, layer: llama.Layers, adapters: Adapters) -> jax.Array:
    """llama.linear with an adapter beside it. Their sum comes before the norm and the rotation of q and k, of
    which the norm is not linear; the weight itself is not changed, in which bfloat16 would round it away."""
    return llama.linear(name, x, layer) + low_rank(name, x, adapters)


def hidden_states(trained: Trained, frozen: llama.Params, config: LlamaConfig, tokens: jax.Array,
                  positions: jax.Array, segment_ids: jax.Array, tables: rope.Tables,
                  memory: Memory) -> jax.Array:
    """llama.hidden_states with adapters: [B, T, D] of tokens int32 [B, T]."""
    params = combine(trained.whole, frozen)
    block = llama.training_block(config, positions, segment_ids, tables, memory)

    def step(x, layer):
        weights, adapters = layer
        weights = int8_weights.gather_layer(weights, x.dtype)
        return block(x, weights, linear=jax.tree_util.Partial(linear, adapters=adapters))[0]

    layers = llama.with_constants(params.layers, config), trained.adapters
    x = int8_weights.embed_tokens(params.embed, tokens, _compute_dtype(trained, memory))
    x = scan_layers(step, x, layers, memory)
    return rms_norm(x, params.final_norm, config.norm_eps)


def _compute_dtype(trained, memory):
    """The dtype of activations and of dequantized weights."""
    return memory.dtype or trained.adapters.wq.down.dtype


def head(trained: Trained, frozen: llama.Params, memory: Memory) -> jax.Array:
    """llama.head with adapters: [D, V], dequantized in the shards in which it is stored."""
    params = combine(trained.whole, frozen).replace(layers=None)
    return llama.head(int8_weights.dequantize(params, _compute_dtype(trained, memory)))


def loss_sum(trained: Trained, frozen: llama.Params, config: LlamaConfig, batch: dict[str, jax.Array],
             tables: rope.Tables, memory: Memory) -> jax.Array:
    """llama.loss_sum with adapters: float32 []."""
    trained = fetch_rest(trained)
    x = hidden_states(
        trained, frozen, config, batch['tokens'], batch['positions'], batch['segment_ids'], tables, memory)
    with jax.named_scope('lm_head'):
        return cross_entropy_sum(x, head(trained, frozen, memory), batch['targets'], batch['loss_mask'],
                                 memory.loss_chunk)
