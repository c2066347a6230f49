"""Llama-3 as one parameter table and pure functions (Touvron et al. 2023; Llama Team 2024).

Letters: B batch, T sequence, N query heads, K key/value heads, H head_dim, D embed_dim, F mlp_dim, V vocab,
L layers. Field names of Params and Layers are the checkpoint keys; layers are stacked on L. Rotary dims use
the half-split order of Hugging Face; Meta's interleaved order is permuted on load.
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from lct import sharding
from lct.models import query_passes
from lct.models.causal_attention import attention
from lct.models.config import LlamaConfig, check_mesh  # noqa: F401
from lct.models.embedding import embed_tokens
from lct.models.memory import Memory, keep_in_core, scan_layers
from lct.models.offload import fetch_rest
from lct.ops import rope
from lct.ops.blockwise_ffn import blockwise_ffn
from lct.ops.cross_entropy import cross_entropy_sum
from lct.ops.masks import Tokens
from lct.ops.norms import rms_norm


class ParamInfo(NamedTuple):
    """One row of the parameter table: its dims by letter, and its initial stddev and mean."""

    letters: str
    stddev: float
    mean: float = 0.0


class Layers(struct.PyTreeNode):
    """The weights of all layers, stacked on L; None for those that a family does not have."""

    attn_norm: Any  # [L, D]
    wq: Any  # [L, D, N, H]
    wk: Any  # [L, D, K, H]
    wv: Any  # [L, D, K, H]
    wo: Any  # [L, N, H, D]
    mlp_norm: Any  # [L, D]
    w_gate: Any  # [L, D, F]
    w_up: Any  # [L, D, F]
    w_down: Any  # [L, F, D]
    q_norm: Any = None  # [L, H]
    k_norm: Any = None  # [L, H]
    q_bias: Any = None  # [L, N, H]
    k_bias: Any = None  # [L, K, H]
    v_bias: Any = None  # [L, K, H]
    out_bias: Any = None  # [L, D]
    gate_bias: Any = None  # [L, F]
    up_bias: Any = None  # [L, F]
    down_bias: Any = None  # [L, D]
    rotates: Any = None  # bool [L], a constant that with_constants adds; None if all layers rotate


class Params(struct.PyTreeNode):
    """All weights of a model."""

    embed: Any  # [V, D]
    layers: Layers
    final_norm: Any  # [D]
    lm_head: Any = None  # [D, V], None when tied to embed


def param_table(config: LlamaConfig) -> Params:
    """Params of ParamInfo: shapes, shardings, initial values and checkpoint targets derive from it."""
    scale = config.embed_dim**-0.5
    residual = (2 * config.num_layers) ** -0.5  # GPT-2: the residual stream keeps its variance with depth

    def optional(present, letters, mean=0.0):
        return ParamInfo(letters, 0.0, mean) if present else None

    return Params(
        embed=ParamInfo('VD', scale),
        layers=Layers(
            attn_norm=ParamInfo('LD', 0.0, 1.0),
            wq=ParamInfo('LDNH', scale),
            wk=ParamInfo('LDKH', scale),
            wv=ParamInfo('LDKH', scale),
            wo=ParamInfo('LNHD', residual * (config.num_heads * config.head_dim) ** -0.5),
            mlp_norm=ParamInfo('LD', 0.0, 1.0),
            w_gate=ParamInfo('LDF', scale),
            w_up=ParamInfo('LDF', scale),
            w_down=ParamInfo('LFD', residual * config.mlp_dim**-0.5),
            q_norm=optional(config.qk_norm, 'LH', 1.0),
            k_norm=optional(config.qk_norm, 'LH', 1.0),
            q_bias=optional(config.qkv_bias, 'LNH'),
            k_bias=optional(config.qkv_bias, 'LKH'),
            v_bias=optional(config.qkv_bias, 'LKH'),
            out_bias=optional(config.out_bias, 'LD'),
            gate_bias=optional(config.mlp_bias, 'LF'),
            up_bias=optional(config.mlp_bias, 'LF'),
            down_bias=optional(config.mlp_bias, 'LD'),
        ),
        final_norm=ParamInfo('D', 0.0, 1.0),
        lm_head=None if config.tie_embeddings else ParamInfo('DV', scale),
    )


def is_param_info(x: Any) -> bool:
    """is_leaf for trees of ParamInfo, which is itself a tuple."""
    return isinstance(x, ParamInfo)


def _over_table(function, config):
    return jax.tree.map(function, param_table(config), is_leaf=is_param_info)


def dims(config: LlamaConfig) -> dict[str, int]:
    """The size of every weight letter."""
    return {
        'V': config.vocab_size, 'D': config.embed_dim, 'F': config.mlp_dim, 'L': config.num_layers,
        'N': config.num_heads, 'K': config.num_kv_heads, 'H': config.head_dim,
    }


def shapes(config: LlamaConfig) -> Params:
    """Params of shape tuples."""
    size = dims(config)
    return _over_table(lambda info: tuple(size[letter] for letter in info.letters), config)


def specs(config: LlamaConfig) -> Params:
    """Params of PartitionSpecs."""
    return _over_table(lambda info: sharding.weight_spec(info.letters), config)


def abstract(config: LlamaConfig, dtype: Any = jnp.float32) -> Params:
    """Params of ShapeDtypeStructs, sharded on the current concrete mesh if there is one."""
    size = dims(config)
    return _over_table(lambda info: abstract_param(info, size, dtype), config)


def abstract_param(info: ParamInfo, size: dict[str, int], dtype: Any) -> jax.ShapeDtypeStruct:
    """One row of a parameter table as a ShapeDtypeStruct; size: {letter: size}."""
    mesh = jax.sharding.get_mesh()
    placement = None if mesh.empty else jax.NamedSharding(mesh, sharding.weight_spec(info.letters))
    return jax.ShapeDtypeStruct(tuple(size[letter] for letter in info.letters), dtype, sharding=placement)


def num_params(config: LlamaConfig) -> int:
    """The exact number of parameters; a tied head counts once."""
    leaves = jax.tree.leaves(shapes(config), is_leaf=lambda x: isinstance(x, tuple))
    return sum(math.prod(shape) for shape in leaves)


def init(config: LlamaConfig, key: jax.Array, dtype: Any = jnp.float32) -> Params:
    """Random Params in the shapes of param_table, each sampled in its place on the current mesh."""
    @functools.partial(jax.jit, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract(config)))
    def sample(key):
        rows, tree = jax.tree.flatten(param_table(config), is_leaf=is_param_info)
        size = dims(config)
        arrays = []
        for info, leaf_key in zip(rows, jax.random.split(key, len(rows))):
            shape = tuple(size[letter] for letter in info.letters)
            if info.stddev == 0:
                arrays.append(jnp.full(shape, info.mean, dtype))
            else:
                arrays.append((info.stddev * jax.random.normal(leaf_key, shape)).astype(dtype))
        return jax.tree.unflatten(tree, arrays)

    return sample(key)


# ---------------------------------------------------------------------------------------------------
# Forward
# ---------------------------------------------------------------------------------------------------


def _einsum(equation, x, w):
    """sharding.einsum of x [B, T, ...]; for x [B, ...], one token per row, T drops out of the equation."""
    letters = equation.split(',')[0]
    return sharding.einsum(equation if x.ndim == len(letters) else equation.replace('T', ''), x, w)


LINEARS = {  # weight -> its einsum, and its bias
    'wq': ('BTD,DNH->BTNH', 'q_bias'), 'wk': ('BTD,DKH->BTKH', 'k_bias'), 'wv': ('BTD,DKH->BTKH', 'v_bias'),
    'wo': ('BTNH,NHD->BTD', 'out_bias'), 'w_gate': ('BTD,DF->BTF', 'gate_bias'),
    'w_up': ('BTD,DF->BTF', 'up_bias'), 'w_down': ('BTF,FD->BTD', 'down_bias'),
}


def linear(name: str, x: jax.Array, layer: Layers) -> jax.Array:
    """x [B, T, ...] through a weight of LINEARS, with its bias if the layer has one."""
    equation, bias = LINEARS[name]
    out, bias = _einsum(equation, x, getattr(layer, name)), getattr(layer, bias)
    return out if bias is None else (out + bias.astype(jnp.float32)).astype(out.dtype)


def project_qkv(x: jax.Array, layer: Layers, angles: tuple, config: LlamaConfig,
                linear: Callable = linear) -> tuple[jax.Array, ...]:
    """Projected and rotated q [B, T, N, H], k and projected v [B, T, K, H] of the normed x [B, T, D]."""
    def rotated(heads, norm):
        heads = heads if norm is None else rms_norm(heads, norm, config.norm_eps)
        return rope.rotate(heads, angles)

    y = rms_norm(x, layer.attn_norm, config.norm_eps)
    q = rotated(linear('wq', y, layer), layer.q_norm)
    k = rotated(linear('wk', y, layer), layer.k_norm)
    return q, k, linear('wv', y, layer)


def mlp(x: jax.Array, layer: Layers, config: LlamaConfig, linear: Callable = linear) -> jax.Array:
    """SwiGLU of the normed x [B, T, D], without the residual (Shazeer 2020)."""
    y = rms_norm(x, layer.mlp_norm, config.norm_eps)
    gate, up = linear('w_gate', y, layer), linear('w_up', y, layer)
    return linear('w_down', jax.nn.silu(gate) * up, layer)


def gathered(layer: Layers, dtype: Any, names: Iterable[str]) -> Layers:
    """The layer with some weights of LINEARS gathered and in dtype, for more than one use of each."""
    letters = lambda name: LINEARS[name][0].split(',')[1].split('->')[0]
    return layer.replace(**{
        name: sharding.gather(getattr(layer, name), letters(name), dtype) for name in names})


def ffn(x: jax.Array, layer: Layers, config: LlamaConfig, num_chunks: int) -> jax.Array:
    """mlp of x [B, T, D] in num_chunks chunks of the sequence, on CPUs as many as keep_in_core wants; its
    weights are gathered once for all."""
    layer = gathered(layer, x.dtype, ('w_gate', 'w_up', 'w_down'))
    num_chunks = keep_in_core(num_chunks, *x.shape[:2])
    return blockwise_ffn(lambda y: mlp(y, layer, config), x, num_chunks)


def block(x: jax.Array, layer: Layers, angles: tuple, config: LlamaConfig, attend: Callable, *,
          linear: Callable = linear, feed_forward: Callable = mlp,
          ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """One transformer layer, for training, adapters, prefill and decoding.

    Args:
      x: [B, T, D], or [B, D] for one token per row. angles: those of rope.angles, for the positions of x.
      attend: (q [B, T, N, H], k, v [B, T, K, H]) -> [B, T, N, H].
      linear: as the function linear, for the projections of attention with adapters.
      feed_forward: (x, layer, config) -> [B, T, D], without the residual.
    Returns:
      x, and the rotated keys and the values [B, T, K, H].
    """
    if layer.rotates is not None:
        angles = rope.angles_if(layer.rotates, angles)
    with jax.named_scope('attention'):
        q, k, v = project_qkv(x, layer, angles, config, linear)
        x = x + linear('wo', attend(q, k, v), layer)
    with jax.named_scope('ffn'):
        return x + feed_forward(x, layer, config), (k, v)


def with_constants(layers: Layers, config: LlamaConfig) -> Layers:
    """The layers as a scan over them needs them: with what differs from layer to layer but is not learned."""
    return layers if config.rope_layers is None else layers.replace(rotates=jnp.array(config.rope_layers))


def causal_block(config: LlamaConfig, positions: jax.Array, segment_ids: jax.Array, tables: rope.Tables,
                 memory: Memory) -> Callable:
    """The block of training and prefill, where a batch attends to itself: (x, layer) -> x, (k, v).

    positions, segment_ids: int32 [B, T]. tables: those of config.rope, an argument so that a changed theta
    needs no new compilation.
    """
    def attend(q, k, v):
        return attention(q, k, v, positions, segment_ids, memory.attention, config.window)

    return functools.partial(block, angles=rope.angles(tables, positions), config=config, attend=attend,
                             feed_forward=functools.partial(ffn, num_chunks=memory.ffn_chunks))


def training_block(config: LlamaConfig, positions: jax.Array, segment_ids: jax.Array, tables: rope.Tables,
                   memory: Memory) -> Callable:
    """causal_block in memory.query_passes passes over the queries; with more than one it returns no keys."""
    if memory.query_passes == 1:
        return causal_block(config, positions, segment_ids, tables, memory)
    feed_forward = functools.partial(ffn, num_chunks=memory.ffn_chunks_in_pass)
    parts = query_passes.Parts(functools.partial(gathered, names=LINEARS),
                               functools.partial(project_qkv, config=config),
                               functools.partial(block, config=config, feed_forward=feed_forward))
    return functools.partial(query_passes.block, parts=parts, angles=rope.angles(tables, positions),
                             tokens=Tokens(positions, segment_ids), memory=memory, window=config.window,
                             linear=linear)


def hidden_states(params: Params, config: LlamaConfig, tokens: jax.Array, positions: jax.Array,
                  segment_ids: jax.Array, tables: rope.Tables, memory: Memory | None = None) -> jax.Array:
    """The final normed hidden states [B, T, D] of tokens int32 [B, T]; other arguments as in causal_block."""
    memory = memory or Memory(remat='none')
    layer_block = training_block(config, positions, segment_ids, tables, memory)
    x = embed_tokens(params.embed, tokens)
    layers = with_constants(params.layers, config)
    x = scan_layers(lambda x, layer: layer_block(x, layer)[0], x, layers, memory)
    return rms_norm(x, params.final_norm, config.norm_eps)


def head(params: Params) -> jax.Array:
    """The output projection [D, V]: its own, or the transposed embedding."""
    return params.embed.T if params.lm_head is None else params.lm_head


def logits(params: Params, config: LlamaConfig, tokens: jax.Array, positions: jax.Array | None = None,
           segment_ids: jax.Array | None = None) -> jax.Array:
    """Logits [B, T, V] in float32 of tokens [B, T], for small checks: the whole [B, T, V] exists.

    positions default to 0..T-1 and segment_ids to one document per row. As in Hugging Face, 'dynamic'
    and 'longrope' scaling depend on the longest position of the batch.

    Raises:
      ValueError: for ids outside the vocabulary, or rows that do not divide over the sequence axis.
    """
    if not isinstance(tokens, jax.Array) and not 0 <= np.min(tokens) <= np.max(tokens) < config.vocab_size:
        raise ValueError(f"ids from {np.min(tokens)} to {np.max(tokens)} are not all among the model's 0 to "
                         f"{config.vocab_size - 1}; encode with the model's own tokenizer")
    tokens = jnp.asarray(tokens)
    if tokens.shape[1] % (ring := sharding.axis_size('sequence')):
        raise ValueError(f'{tokens.shape[1]} tokens a row do not divide over the {ring} devices of the '
                         'sequence axis; cut or pad them to a multiple')
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    if segment_ids is None:
        segment_ids = jnp.ones(tokens.shape, jnp.int32)
    seq_len = int(jnp.max(jnp.asarray(positions))) + 1
    batch = [sharding.put(x, sharding.spec('BT')) for x in (tokens, positions, segment_ids)]
    tables = rope.make_tables(config.rope, config.head_dim, seq_len)
    return _logits(params, config.architecture(), *batch, tables)


@functools.partial(jax.jit, static_argnames='config')
def _logits(params, config, tokens, positions, segment_ids, tables):
    x = hidden_states(params, config, tokens, positions, segment_ids, tables)
    with jax.named_scope('lm_head'):
        return sharding.einsum('BTD,DV->BTV', x.astype(jnp.float32), head(params).astype(jnp.float32))


def loss_sum(params: Params, config: LlamaConfig, batch: dict[str, jax.Array], tables: rope.Tables,
             memory: Memory) -> jax.Array:
    """The sum over the batch of loss_mask * cross-entropy, float32 []; the caller divides it by the sum of
    loss_mask over the global batch.

    batch: dict of tokens, targets, positions, segment_ids int32 [B, T] and loss_mask float32 [B, T].
    """
    params = fetch_rest(params)
    x = hidden_states(
        params, config, batch['tokens'], batch['positions'], batch['segment_ids'], tables, memory
    )
    with jax.named_scope('lm_head'):
        return cross_entropy_sum(x, head(params), batch['targets'], batch['loss_mask'], memory.loss_chunk)
