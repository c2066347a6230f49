"""The key/value cache: split over 'sequence' and never moved; queries are sent to it.

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
from lct.ops.blockwise_attention import MASK_VALUE, KVBlock, QueryBlock, attend, init_accumulator
from lct.ops.masks import Tokens
from lct.ops.strategies import Attention

CACHE = sharding.spec('LBKSH')


class KVCache(struct.PyTreeNode):
    """Keys (rotated) and values of every slot. A slot's logical position is fixed by the layout from the
    start; segment 1 marks a filled slot, segment 0 one that no query attends to."""

    k: Any  # [L, B, K, S, H] in the model's dtype: heads first, so that the keys of a head are contiguous
    v: Any  # [L, B, K, S, H]
    positions: Any  # int32 [B, S]
    segment_ids: Any  # int32 [B, S]


def empty_cache(config: LlamaConfig, positions: jax.Array, dtype: Any) -> KVCache:
    """A KVCache without filled slots, for slots at positions int32 [B, S]."""
    batch, length = positions.shape
    zeros = jnp.zeros((config.num_layers, batch, config.num_kv_heads, length, config.head_dim), dtype,
                      out_sharding=None if sharding.current_mesh() is None else CACHE)
    return KVCache(zeros, zeros, positions, jnp.zeros_like(positions))


def named_arrays(cache: KVCache) -> dict[str, Any]:
    """{name: array} of what the slots hold. The dims of each array begin with [L, B, K, S]."""
    leaves = jax.tree_util.tree_leaves_with_path(cache.replace(positions=None, segment_ids=None))
    return {jax.tree_util.keystr(path, simple=True, separator='.'): leaf for path, leaf in leaves}


def attend_cache(q: jax.Array, k: jax.Array, v: jax.Array, cached_k: jax.Array, cached_v: jax.Array,
                 mask: jax.Array) -> jax.Array:
    """Attention of one query per row to its own key and to the cached keys of the mask.

    Args:
      q: [B, N, H]; k, v: [B, K, H] of the same token; cached_k, cached_v: [B, K, S, H]; mask: bool [B, S].
    Returns:
      [B, N, H] in q's dtype.
    """
    if sharding.current_mesh() is None:
        return _attend_local(q, k, v, cached_k, cached_v, mask, axis_name=None)
    heads, own, cached, slots = (sharding.spec(letters) for letters in ('BNH', 'BKH', 'BKSH', 'BS'))
    return jax.shard_map(
        functools.partial(_attend_local, axis_name='sequence'),
        in_specs=(heads, own, own, cached, cached, slots), out_specs=heads,
    )(q, k, v, cached_k, cached_v, mask)


def _attend_local(q, k, v, cached_k, cached_v, mask, axis_name):
    """The device's own slots, then one merge over axis_name. The token's own key is added on every device
    after the merge, so that no row is ever empty."""
    batch, heads, head_dim = q.shape
    kv_heads, dtype = k.shape[1], q.dtype
    q = q.astype(jnp.float32).reshape(batch, kv_heads, heads // kv_heads, head_dim) * head_dim**-0.5
    k, v = k.astype(jnp.float32), v.astype(jnp.float32)
    einsum = functools.partial(jnp.einsum, precision='highest')
    scores = einsum('BKGH,BKSH->BKGS', q, cached_k.astype(jnp.float32))
    scores = jnp.where(mask[:, None, None, :], scores, MASK_VALUE)
    own = einsum('BKGH,BKH->BKG', q, k)
    top = scores.max(-1)
    if axis_name is not None:
        top = lax.pmax(top, axis_name)
    top = jnp.maximum(top, own)
    weights = jnp.exp(scores - top[..., None])
    local = einsum('BKGS,BKSH->BKGH', weights, cached_v.astype(jnp.float32)), weights.sum(-1)
    out, total = local if axis_name is None else lax.psum(local, axis_name)
    own = jnp.exp(own - top)
    out = (out + own[..., None] * v[:, :, None, :]) / (total + own)[..., None]
    return out.reshape(batch, heads, head_dim).astype(dtype)


def write(cache: KVCache, k: jax.Array, v: jax.Array, slots: jax.Array) -> KVCache:
    """The cache with k and v [L, B, K, T, H] in the slots int32 [B, T], now filled; tokens with slots past
    the cache are discarded. Each device tests whether a slot is its own."""
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

    def put(cached, new):  # [L, B, K, S, H], [L, B, K, T, H]
        new = new.transpose(1, 3, 0, 2, 4)  # [B, T, L, K, H]: indices around a slice come first in an update
        return cached.at[:, rows, :, local].set(new.astype(cached.dtype), mode='drop')

    return put(cached_k, k), put(cached_v, v), segment_ids.at[rows, local].set(1, mode='drop')


Block = tuple[jax.Array, jax.Array, jax.Array, jax.Array]  # k, v [B, K, S, H], positions, segments [B, S]


def attend_chunk(q: jax.Array, own: Block, cached: Block, split: Attention,
                 window: int | None = None) -> jax.Array:
    """Attention of the queries q [B, T, N, H] of a chunk to the keys of the chunk and of the cache.

    split: only its chunks are used. window: as in LlamaConfig.
    """
    local = functools.partial(_attend_chunk_local, split=split, window=window)
    if sharding.current_mesh() is None:
        return local(q, own, cached, axis_name=None)
    heads, tokens, keys = (sharding.spec(letters) for letters in ('BTNH', 'BT', 'BKSH'))
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
