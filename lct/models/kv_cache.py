"""The key/value cache: split over 'sequence' and never moved; queries are sent to it.

Keys and values stand in the cache in the model's dtype, another float dtype, or in 8 bits (lct.ops.int8);
bfloat16 as its bits (lct.ops.bfloat16_bits). A query reads them tile by tile: no layer of the cache is copied
or converted as a whole.

Letters: B batch, T new tokens, S cache slots, N query heads, K key/value heads, G = N / K, H head_dim,
L layers.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.sharding import PartitionSpec as P

from lct import sharding
from lct.models.config import LlamaConfig
from lct.ops import bfloat16_bits
from lct.ops.blockwise_attention import MASK_VALUE, KVBlock, QueryBlock, attend, init_accumulator
from lct.ops.int8 import Int8Vectors, factors, quantize
from lct.ops.masks import Tokens
from lct.ops.strategies import Attention

CACHE = sharding.spec('LBKS')  # of keys and values [L, B, K, S, H] and of their scales [L, B, K, S]
# Elements of a tile of keys: what the cache of a core holds, and enough work for a launch on an accelerator.
CPU_TILE, TILE = 2**17, 2**26
Vectors = jax.Array | Int8Vectors


class KVCache(struct.PyTreeNode):
    """Keys (rotated) and values of every slot. A slot's logical position is fixed by the layout from the
    start; segment 1 marks a filled slot, segment 0 one that no query attends to."""

    k: Any  # Vectors [L, B, K, S, H]: heads first, so that the keys of a head are contiguous
    v: Any  # Vectors [L, B, K, S, H]
    positions: Any  # int32 [B, S]
    segment_ids: Any  # int32 [B, S]


def empty_cache(config: LlamaConfig, positions: jax.Array, dtype: Any) -> KVCache:
    """A KVCache without filled slots, for slots at positions int32 [B, S]; dtype: of keys and values."""
    batch, length = positions.shape
    shape = config.num_layers, batch, config.num_kv_heads, length, config.head_dim
    placement = None if sharding.current_mesh() is None else CACHE
    zeros = lambda shape, dtype: jnp.zeros(shape, dtype, out_sharding=placement)
    if jnp.dtype(dtype) == jnp.int8:
        vectors = Int8Vectors(zeros(shape, jnp.int8), zeros(shape[:-1], jnp.uint16))
    else:
        vectors = zeros(shape, bfloat16_bits.DTYPE if jnp.dtype(dtype) == jnp.bfloat16 else dtype)
    return KVCache(vectors, vectors, positions, jnp.zeros_like(positions))


def named_arrays(cache: KVCache) -> dict[str, Any]:
    """{name: array} of what the slots hold. The dims of each array begin with [L, B, K, S]."""
    leaves = jax.tree_util.tree_leaves_with_path(cache.replace(positions=None, segment_ids=None))
    return {jax.tree_util.keystr(path, simple=True, separator='.'): leaf for path, leaf in leaves}


def encode(x: jax.Array, dtype: Any) -> Vectors:
    """Keys or values x [..., H] as a cache of the dtype keeps them; dtype None: that of x."""
    dtype = jnp.dtype(x.dtype if dtype is None else dtype)
    if dtype == jnp.int8:
        return quantize(x)
    return bfloat16_bits.encode(x) if dtype == jnp.bfloat16 else x.astype(dtype)


def dtype_of(cache: KVCache) -> Any:
    """The dtype of cached keys and values."""
    if isinstance(cache.k, Int8Vectors):
        return jnp.int8
    return jnp.bfloat16 if cache.k.dtype == bfloat16_bits.DTYPE else cache.k.dtype


def bytes_of(config: LlamaConfig, dtype: Any) -> int:
    """Bytes of a slot of the cache: keys and values of all layers and heads, with the scales of int8."""
    dtype = jnp.dtype(dtype)
    vector = config.head_dim * dtype.itemsize + 2 * (dtype == jnp.int8)
    return 2 * config.num_layers * config.num_kv_heads * vector


def attend_cache(q: jax.Array, k: jax.Array, v: jax.Array, cache: KVCache, layer: jax.Array,
                 mask: jax.Array) -> jax.Array:
    """Attention of one query per row to its own key and to the cached keys of the mask.

    Args:
      q: [B, N, H]; k, v: [B, K, H] of the same token; layer: int32 [], the layer of the cache that is read;
      mask: bool [B, S].
    Returns:
      [B, N, H] in q's dtype.
    """
    if sharding.current_mesh() is None:
        return _attend_local(q, k, v, cache.k, cache.v, layer, mask, axis_name=None)
    heads, own, slots = (sharding.spec(letters) for letters in ('BNH', 'BKH', 'BS'))
    return jax.shard_map(
        functools.partial(_attend_local, axis_name='sequence'),
        in_specs=(heads, own, own, CACHE, CACHE, P(), slots), out_specs=heads,
    )(q, k, v, cache.k, cache.v, layer, mask)


def _attend_local(q, k, v, cached_k, cached_v, layer, mask, axis_name):
    """The device's own slots, then one merge over axis_name. The token's own key is added on every device
    after the merge, so that no row is ever empty."""
    batch, heads, head_dim = q.shape
    kv_heads, dtype = k.shape[1], q.dtype
    # float32 means float32 on every device; for other models fewer bits of a product suffice
    precision = 'highest' if dtype == jnp.float32 else None
    q = q.astype(jnp.float32).reshape(batch, kv_heads, heads // kv_heads, head_dim)
    k, v = k.astype(jnp.float32), v.astype(jnp.float32)
    tiled = lambda size: functools.partial(_attend_tiles, tile_size=size, precision=precision)
    out, top, total = lax.platform_dependent(
        q, cached_k, cached_v, layer, mask, cpu=tiled(CPU_TILE), default=tiled(TILE))
    own = jnp.einsum('BKGH,BKH->BKG', q, k, precision='highest') * head_dim**-0.5
    new_top = jnp.maximum(top if axis_name is None else lax.pmax(top, axis_name), own)
    weight = jnp.exp(top - new_top)
    local = out * weight[..., None], total * weight
    out, total = local if axis_name is None else lax.psum(local, axis_name)
    own = jnp.exp(own - new_top)
    out = (out + own[..., None] * v[:, :, None, :]) / (total + own)[..., None]
    return out.reshape(batch, heads, head_dim).astype(dtype)


def _attend_tiles(q, cached_k, cached_v, layer, mask, tile_size, precision):
    """Online softmax of q [B, K, G, H] over the slots of the mask: float32 (sums of weighted values
    [B, K, G, H], largest score [B, K, G], sum of weights [B, K, G]); MASK_VALUE and anything where there are
    no slots. The tiles before the first slot of the mask and after the last are skipped."""
    length, kv_heads, head_dim = mask.shape[1], q.shape[1], q.shape[3]
    tile = min(max(tile_size // (mask.shape[0] * kv_heads * head_dim), 1), length)
    einsum = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)

    def step(i, carry):
        acc, top, total = carry
        start = jnp.minimum(i * tile, length - tile)  # the last tile may repeat slots of the one before it
        k, k_scales = factors(_slots(cached_k, layer, start, tile))
        v, v_scales = factors(_slots(cached_v, layer, start, tile))
        attended = lax.dynamic_slice_in_dim(mask, start, tile, 1) & (start + jnp.arange(tile) >= i * tile)
        scores = einsum('BKGH,BKSH->BKGS', q, k) * (head_dim**-0.5 * _over_group(k_scales))
        scores = jnp.where(attended[:, None, None], scores, MASK_VALUE)
        new_top = jnp.maximum(top, scores.max(-1))
        weights, old = jnp.exp(scores - new_top[..., None]), jnp.exp(top - new_top)
        added = einsum('BKGS,BKSH->BKGH', weights * _over_group(v_scales), v)
        return acc * old[..., None] + added, new_top, total * old + weights.sum(-1)

    filled = mask.any(0)
    first, last = jnp.argmax(filled), length - jnp.argmax(filled[::-1])
    # Inside shard_map the results vary over the axes of the cache too, which q does not.
    like = jax.tree.leaves(cached_k)[0]
    full = lambda shape, value: lax.full_like(like, value, jnp.float32, shape=shape)
    start = full(q.shape, 0), full(q.shape[:3], MASK_VALUE), full(q.shape[:3], 0)
    return lax.fori_loop(first // tile, jnp.where(filled.any(), -(-last // tile), 0), step, start)


def _slots(cached, layer, start, count):
    """[B, K, count, ...] of a layer, from every leaf of the Vectors [L, B, K, S, ...]."""
    def cut(x):
        shape = (1, *x.shape[1:3], count, *x.shape[4:])
        return lax.dynamic_slice(x, (layer, 0, 0, start, 0)[:x.ndim], shape)[0]

    return jax.tree.map(cut, cached)


def _over_group(scales):
    """Scales [B, K, S], or 1.0, for scores [B, K, G, S]."""
    return scales if isinstance(scales, float) else scales[:, :, None]


def write(cache: KVCache, k: Vectors, v: Vectors, slots: jax.Array) -> KVCache:
    """The cache with k and v [L, B, K, T, H], encoded as the cache, in the slots int32 [B, T], now filled;
    tokens with slots past the cache are discarded. Each device tests whether a slot is its own."""
    if sharding.current_mesh() is None:
        arrays = _write_local(cache.k, cache.v, cache.segment_ids, k, v, slots, axis_name=None)
    else:
        filled, new, rows = sharding.spec('BS'), P(None, sharding.BATCH_AXES, 'tensor'), sharding.spec('B')
        arrays = jax.shard_map(
            functools.partial(_write_local, axis_name='sequence'),
            in_specs=(CACHE, CACHE, filled, new, new, rows), out_specs=(CACHE, CACHE, filled),
        )(cache.k, cache.v, cache.segment_ids, k, v, slots)
    return cache.replace(k=arrays[0], v=arrays[1], segment_ids=arrays[2])


def _write_local(cached_k, cached_v, segment_ids, k, v, slots, axis_name):
    length = segment_ids.shape[1]
    first = 0 if axis_name is None else lax.axis_index(axis_name) * length
    # A slot of another device is out of range here and its write is dropped; -1 would count from the end.
    local = jnp.where(slots >= first, slots - first, length)
    rows = jnp.arange(slots.shape[0])[:, None]

    def put(cached, new):  # leaves [L, B, K, S, ...], [L, B, K, T, ...]
        # [B, T, L, K, ...]: indices around a slice come first in an update
        new = new.transpose((1, 3, 0, 2, 4)[:new.ndim])
        return cached.at[:, rows, :, local].set(new, mode='drop')

    return (jax.tree.map(put, cached_k, k), jax.tree.map(put, cached_v, v),
            segment_ids.at[rows, local].set(1, mode='drop'))


Block = tuple[Vectors, Vectors, jax.Array, jax.Array]  # k, v [B, K, S, H], positions, segments [B, S]


def attend_chunk(q: jax.Array, own: Block, cached: Block, split: Attention,
                 window: int | None = None) -> jax.Array:
    """Attention of the queries q [B, T, N, H] of a chunk to the keys of the chunk and of the cache.

    split: only its chunks are used. window: as in LlamaConfig.
    """
    local = functools.partial(_attend_chunk_local, split=split, window=window)
    if sharding.current_mesh() is None:
        return local(q, own, cached, axis_name=None)
    heads, tokens, keys = (sharding.spec(letters) for letters in ('BTNH', 'BT', 'BKS'))
    block = keys, keys, tokens, tokens
    return jax.shard_map(functools.partial(local, axis_name='sequence'), in_specs=(heads, block, block),
                         out_specs=heads)(q, own, cached)


def _attend_chunk_local(q, own, cached, axis_name, split, window):
    """All queries of the chunk attend to this device's keys; one merge returns each to its owner."""
    gather = lambda x: x if axis_name is None else lax.all_gather(x, axis_name, axis=1, tiled=True)
    _, _, positions, segments = own
    grouped = q.reshape(*q.shape[:2], own[0].shape[1], -1, q.shape[3])
    all_q, positions, segments = gather(grouped), gather(positions), gather(segments)
    queries, total = QueryBlock(all_q, Tokens(positions, segments)), init_accumulator(all_q)
    for k, v, *tokens in (own, cached):
        total = attend(total, queries, KVBlock.create(k, v, Tokens(*tokens)), split.chunks, window)
    out, lse = total
    if axis_name is not None:
        weights = jnp.exp(lse - lax.pmax(lse, axis_name))[..., None]
        scatter = functools.partial(lax.psum_scatter, axis_name=axis_name, scatter_dimension=1, tiled=True)
        out = scatter(out * weights) / scatter(weights)
    return out.reshape(q.shape).astype(q.dtype)
