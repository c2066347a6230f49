"""Generation from long prompts: ring prefill straight into a sharded key/value cache, then decode.

The cache is split over 'sequence' and never moves: every device attends to its own part with each new
query, and one log-sum-exp merge per layer puts the parts together.

Letters: B batch, S cache slots, N query heads, K key/value heads, G = N / K, H head_dim, D embed_dim,
F mlp_dim, V vocab, L layers.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.sharding import PartitionSpec as P

from lct import sharding
from lct.models import llama
from lct.ops import rope
from lct.ops.blockwise_attention import NOTHING
from lct.ops.norms import rms_norm

CACHE = sharding.spec('LBSKH')


class KVCache(struct.PyTreeNode):
    """Keys (rotated) and values of every slot. A slot's logical position is fixed by the layout from the
    start; segment 1 says that it is filled, segment 0 that nobody sees it."""

    k: Any  # [L, B, S, K, H] in the model's dtype
    v: Any  # [L, B, S, K, H]
    positions: Any  # int32 [B, S]
    segment_ids: Any  # int32 [B, S]


def prefill(params, config, tokens, positions, segment_ids, last, tables, memory):
    """Run the prompts once and keep their keys and values.

    Args:
      tokens, positions, segment_ids: int32 [B, S] in the layout's order; segment 0 marks slots that hold
        no token yet, whose positions are those of the tokens to come.
      last: int32 [B], position of each row's last prompt token.
      tables: rope.Tables of the config.
    Returns:
      KVCache and the float32 logits [B, V] that follow each row's last prompt token.
    """
    angles = rope.angles(tables, positions)

    def block(x, layer):
        q, k, v = llama.project_qkv(x, layer, angles, config)
        out = llama.attention(q, k, v, positions, segment_ids, memory.attention)
        x = x + sharding.einsum('BTNH,NHD->BTD', out, layer.wo)
        return x + llama.ffn(x, layer, config, memory.ffn_chunks), (k, v)

    x, (k, v) = lax.scan(block, llama.embed_tokens(params.embed, tokens), params.layers)
    # One row of x each, wherever it lies: a masked sum is exact and leaves 'sequence' where it is.
    x = jnp.where((positions == last[:, None])[:, :, None], x, 0).sum(1)
    return KVCache(k, v, positions, segment_ids), _next_logits(params, config, x)


def _next_logits(params, config, x):
    """Final norm and head of x [B, D] -> float32 [B, V]."""
    x = rms_norm(x, params.final_norm, config.norm_eps).astype(jnp.float32)
    return sharding.einsum('BD,DV->BV', x, llama.head(params).astype(jnp.float32))


# ---------------------------------------------------------------------------------------------------
# One token
# ---------------------------------------------------------------------------------------------------


def decode_step(params, config, cache, tokens, positions, slots, tables):
    """One more token per row.

    Args:
      tokens, positions: int32 [B], the new tokens and their logical positions.
      slots: int32 [B], where the layout puts those positions in the cache.
    Returns:
      the cache with the new tokens in it, and the float32 logits [B, V] that follow them.
    """
    angles = [x[:, 0] for x in rope.angles(tables, positions[:, None])]  # [B, 1, H/2]
    seen = (cache.segment_ids > 0) & (cache.positions < positions[:, None])

    def block(x, inputs):
        layer, cached_k, cached_v = inputs
        y = rms_norm(x, layer.attn_norm, config.norm_eps)
        q = rope.rotate(sharding.einsum('BD,DNH->BNH', y, layer.wq), angles)
        k = rope.rotate(sharding.einsum('BD,DKH->BKH', y, layer.wk), angles)
        v = sharding.einsum('BD,DKH->BKH', y, layer.wv)
        x = x + sharding.einsum('BNH,NHD->BD', attend_cache(q, k, v, cached_k, cached_v, seen), layer.wo)
        return x + _mlp(x, layer, config), (k, v)

    x = _embed(params.embed, tokens)
    # The cache is only read inside the scan over layers and written once after it: as a carry or an
    # output of the scan it would be copied whole for every token.
    x, (k, v) = lax.scan(block, x, (params.layers, cache.k, cache.v))
    return write(cache, k, v, slots), _next_logits(params, config, x)


def _embed(embed, tokens):
    if sharding.current_mesh() is None:
        return embed[tokens]
    return jax.reshard(embed, P(None, None)).at[tokens].get(out_sharding=sharding.spec('BD'))


def _mlp(x, layer, config):
    """llama.mlp for x [B, D]: one token per row leaves nothing to split over 'sequence'."""
    y = rms_norm(x, layer.mlp_norm, config.norm_eps)
    gate = sharding.einsum('BD,DF->BF', y, layer.w_gate)
    up = sharding.einsum('BD,DF->BF', y, layer.w_up)
    return sharding.einsum('BF,FD->BD', jax.nn.silu(gate) * up, layer.w_down)


def attend_cache(q, k, v, cached_k, cached_v, seen):
    """Attention of one query per row to its own key and to every cached key that it sees.

    Args:
      q: [B, N, H]; k, v: [B, K, H] of the same token; cached_k, cached_v: [B, S, K, H]; seen: bool [B, S].
    Returns:
      [B, N, H] in q's dtype.
    """
    if sharding.current_mesh() is None:
        return _attend_local(q, k, v, cached_k, cached_v, seen, axis_name=None)
    heads, own, cached, slots = (sharding.spec(letters) for letters in ('BNH', 'BKH', 'BSKH', 'BS'))
    return jax.shard_map(
        functools.partial(_attend_local, axis_name='sequence'),
        in_specs=(heads, own, own, cached, cached, slots), out_specs=heads,
    )(q, k, v, cached_k, cached_v, seen)


def _attend_local(q, k, v, cached_k, cached_v, seen, axis_name):
    """The device's own slots, then one merge over axis_name. The token's own key is added on every device
    after the merge, so that no row is ever empty."""
    batch, heads, head_dim = q.shape
    kv_heads, dtype = k.shape[1], q.dtype
    q = q.astype(jnp.float32).reshape(batch, kv_heads, heads // kv_heads, head_dim) * head_dim**-0.5
    k, v = k.astype(jnp.float32), v.astype(jnp.float32)
    einsum = functools.partial(jnp.einsum, precision='highest')
    scores = einsum('BKGH,BSKH->BKGS', q, cached_k.astype(jnp.float32))
    scores = jnp.where(seen[:, None, None, :], scores, NOTHING)
    own = einsum('BKGH,BKH->BKG', q, k)
    top = scores.max(-1)
    if axis_name is not None:
        top = lax.pmax(top, axis_name)
    top = jnp.maximum(top, own)
    weights = jnp.exp(scores - top[..., None])
    part = einsum('BKGS,BSKH->BKGH', weights, cached_v.astype(jnp.float32)), weights.sum(-1)
    out, total = part if axis_name is None else lax.psum(part, axis_name)
    own = jnp.exp(own - top)
    out = (out + own[..., None] * v[:, :, None, :]) / (total + own)[..., None]
    return out.reshape(batch, heads, head_dim).astype(dtype)


def write(cache, k, v, slots):
    """The cache with k and v [L, B, K, H] in the slots [B], now filled. Each device tests whether a slot
    is its own."""
    if sharding.current_mesh() is None:
        arrays = _write_local(cache.k, cache.v, cache.segment_ids, k, v, slots, axis_name=None)
    else:
        filled, new, rows = sharding.spec('BS'), sharding.spec('LBKH'), sharding.spec('B')
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
    rows = jnp.arange(slots.shape[0])
    cached_k = cached_k.at[:, rows, local].set(k.astype(cached_k.dtype), mode='drop')
    cached_v = cached_v.at[:, rows, local].set(v.astype(cached_v.dtype), mode='drop')
    return cached_k, cached_v, segment_ids.at[rows, local].set(1, mode='drop')


# ---------------------------------------------------------------------------------------------------
# Generation
# ---------------------------------------------------------------------------------------------------


def length_unit(ring_size, ffn_chunks):
    """Sequence lengths are multiples of this: two stretches per device, and FFN pieces that span the ring."""
    return math.lcm(2 * ring_size, ring_size * ffn_chunks)


def cache_len(length, ring_size, ffn_chunks=1):
    """Cache slots for length tokens: a multiple of 2 * ring_size * ffn_chunks, and of 64 * 2 * ring_size for
    more than that, so that attention finds chunks that divide a device's share."""
    unit, whole_chunks = 2 * ring_size * ffn_chunks, 64 * 2 * ring_size
    if length > whole_chunks:
        unit = math.lcm(unit, whole_chunks)
    return -(-length // unit) * unit


def check_ids(rows, vocab_size):
    """Refuse token ids outside 0 .. vocab_size - 1: a device would clamp a wrong id without a word."""
    for i, ids in enumerate(rows):
        ids = np.asarray(ids)
        bad = np.flatnonzero((ids < 0) | (ids >= vocab_size))
        if bad.size:
            raise ValueError(
                f'token id {ids[bad[0]]} in row {i}, column {bad[0]} is not in 0..{vocab_size - 1}; use the '
                "tokenizer of the model's checkpoint"
            )


def rope_at(config, head_dim, length):
    """The RopeConfig with its scaling settled for texts of length tokens, however long the tables are:
    'dynamic' and 'longrope' would otherwise scale for the empty slots at the end of a cache."""
    if config.type == 'dynamic':
        theta = config.theta
        if length > config.max_position:
            theta = rope.dynamic_ntk_theta(
                theta, config.max_position, length, alpha=config.factor, head_dim=head_dim)
        return dataclasses.replace(config, type='default', theta=theta, factor=1.0, max_position=None)
    if config.type == 'longrope':
        chosen = config.long_factor if length > config.original_max_position else config.short_factor
        return dataclasses.replace(config, long_factor=chosen, short_factor=chosen)
    return config


def arrange(prompts, seq_len, indices=None):
    """Right-padded prompts in the layout's order.

    Args:
      prompts: B lists of token ids of any lengths up to seq_len.
      indices: [S], the layout's permutation: slot i holds position indices[i]. None is 0..S-1.
    Returns:
      dict of int32 numpy arrays: tokens, positions, segment_ids [B, S], last [B] (the position of the
      last prompt token) and slot_of [S] (the slot of each position).
    """
    indices = np.arange(seq_len) if indices is None else np.asarray(indices)
    if sorted(indices.tolist()) != list(range(seq_len)):
        raise ValueError(
            f'indices must be a permutation of the {seq_len} cache slots, got {indices.size} values; '
            'make them with data.layout.permutation(name, seq_len, ring_size)'
        )
    lengths = np.array([len(prompt) for prompt in prompts])
    tokens = np.zeros((len(prompts), seq_len), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[:len(prompt)] = prompt
    return {
        'tokens': tokens[:, indices],
        'positions': np.tile(indices.astype(np.int32), (len(prompts), 1)),
        'segment_ids': (indices < lengths[:, None]).astype(np.int32),
        'last': (lengths - 1).astype(np.int32),
        'slot_of': np.argsort(indices).astype(np.int32),
    }


def generate(params, config, prompts, max_new_tokens, *, seq_len=None, indices=None, memory=None,
             stop_id=None, batch_size=None):
    """Greedy continuations, prefill and all decode steps in one compiled program.

    The program depends on config.architecture() and on the shapes alone, so that a model before and after
    extension shares it. 'dynamic' and 'longrope' scaling look at the longest prompt with its new tokens.

    Args:
      prompts: B lists of token ids, of unequal lengths if need be.
      seq_len: slots of the cache, a multiple of length_unit; default cache_len of what is needed.
      indices: [seq_len] permutation of the layout; default contiguous.
      memory: llama.Memory, of which chunks and ffn_chunks matter here.
      stop_id: everything after its first occurrence becomes stop_id.
      batch_size: rows computed at a time; default all. The last group is padded to it.
    Returns:
      numpy int32 [B, max_new_tokens].
    """
    memory = memory or llama.Memory()
    lengths = [len(prompt) for prompt in prompts]
    if not lengths or min(lengths) < 1 or max_new_tokens < 1:
        raise ValueError(
            f'generate needs prompts of at least one token and max_new_tokens of at least 1, got lengths '
            f'{lengths[:8]} and max_new_tokens {max_new_tokens}; give an empty prompt its BOS'
        )
    needed = max(lengths) + max_new_tokens - 1  # the last new token is never fed back
    ring_size = sharding.axis_size('sequence')
    multiple = length_unit(ring_size, memory.ffn_chunks)
    if seq_len is None:
        seq_len = cache_len(needed, ring_size, memory.ffn_chunks)
    if seq_len < needed or seq_len % multiple:
        raise ValueError(
            f'seq_len {seq_len} must be a multiple of {multiple} (ring_size {ring_size}, ffn_chunks '
            f'{memory.ffn_chunks}) and hold the longest prompt {max(lengths)} + max_new_tokens '
            f'{max_new_tokens} - 1 = {needed}; use {-(-needed // multiple) * multiple} or more'
        )
    check_ids(prompts, config.vocab_size)
    rows = sharding.axis_size('data') * sharding.axis_size('fsdp')
    batch_size = -(-(batch_size or len(prompts)) // rows) * rows
    tables = rope.make_tables(rope_at(config.rope, config.head_dim, needed), config.head_dim, seq_len)
    groups = []
    for start in range(0, len(prompts), batch_size):
        group = prompts[start:start + batch_size]
        filled = [*group, *[[0]] * (batch_size - len(group))]
        batch = arrange(filled, seq_len, indices)
        placed = {
            name: sharding.put(x, sharding.spec({1: 'B', 2: 'BS'}[x.ndim])) if name != 'slot_of'
            else sharding.put(x, P(None)) for name, x in batch.items()
        }
        new = _generate(params, config.architecture(), placed, tables, memory, max_new_tokens)
        groups.append(np.asarray(new)[:len(group)])
    out = np.concatenate(groups)
    if stop_id is not None:
        stopped = np.cumsum(out == stop_id, axis=1) > 0
        out = np.where(stopped, stop_id, out)
    return out.astype(np.int32)


@functools.partial(jax.jit, static_argnames=('config', 'memory', 'max_new_tokens'))
def _generate(params, config, batch, tables, memory, max_new_tokens):
    last = batch['last']
    cache, logits = prefill(
        params, config, batch['tokens'], batch['positions'], batch['segment_ids'], last, tables, memory
    )
    slot_of = batch['slot_of']

    def slots_of(positions):
        if sharding.current_mesh() is None:
            return slot_of[positions]
        return slot_of.at[positions].get(out_sharding=sharding.spec('B'))

    def step(carry, _):
        cache, token, position = carry
        cache, logits = decode_step(params, config, cache, token, position, slots_of(position), tables)
        return (cache, _argmax(logits), position + 1), token

    first = (cache, _argmax(logits), last + 1)
    (_, token, _), tokens = lax.scan(step, first, length=max_new_tokens - 1)
    return jnp.concatenate([tokens, token[None]]).T


def _argmax(logits):
    """The likeliest word [B] of logits [B, V]; the vocabulary is gathered, one row per prompt is small."""
    return jnp.argmax(sharding.reshard(logits, sharding.spec('BD')), -1).astype(jnp.int32)
