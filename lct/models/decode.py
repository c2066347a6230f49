"""Generation from long prompts: ring prefill straight into a sharded key/value cache, then decode.

The cache is split over 'sequence' and never moves: every device attends to its own slots with each new
query, and one log-sum-exp merge per layer combines the results. A prompt that is too long for one forward is
read in prefill chunks, and a text that was read once serves any number of questions (extend).

Letters: B batch, T new tokens, S cache slots, N query heads, K key/value heads, G = N / K, H head_dim,
D embed_dim, F mlp_dim, V vocab, L layers.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.sharding import PartitionSpec as P

from lct import sharding
from lct.models import kv_cache, llama, row_linear
from lct.models.config import LlamaConfig
from lct.models.embedding import embed_row_tokens
from lct.models.kv_cache import KVCache, attend_cache, attend_chunk, write
from lct.models.memory import Memory
from lct.models.prompt_layout import (
    Chunk,
    PromptBatch,
    arrange,
    cache_len,
    check_prompts,
    length_unit,
    place,
    rope_at,
)
from lct.models.sampling import Sampling, next_token
from lct.ops import rope
from lct.ops.norms import rms_norm


class Request(struct.PyTreeNode):
    """The tokens to decode.

    limits: int32 [B], new tokens of each row, up to max_new_tokens; 0 for a padding row.
    stop: bool [V], the tokens that end a row; the stop token is its last one.
    sampling, key: as in sampling.next_token.
    """

    limits: jax.Array
    stop: jax.Array
    max_new_tokens: int = struct.field(pytree_node=False)
    sampling: Sampling | None = None
    key: Any = None


def place_request(limits: np.ndarray, stop: np.ndarray, max_new_tokens: int, sampling: Sampling | None = None,
                  key: jax.Array | None = None) -> Request:
    """The Request of limits [B] and stop [V] on the current mesh."""
    limits, stop = sharding.put(limits, sharding.spec('B')), sharding.put(stop, P(None))
    return Request(limits, stop, max_new_tokens, sampling, key)


# ---------------------------------------------------------------------------------------------------
# Prefill
# ---------------------------------------------------------------------------------------------------


def prefill(params: llama.Params, config: LlamaConfig, batch: PromptBatch, tables: rope.Tables,
            memory: Memory) -> tuple[KVCache, jax.Array]:
    """Run the prompts once and keep their keys and values.

    tables: those of config.rope.

    Returns:
      KVCache and the float32 logits [B, V] that follow each row's last prompt token.
    """
    block = llama.causal_block(config, batch.positions, batch.segment_ids, tables, memory)

    def step(x, layer):
        x, new = block(x, layer)
        return x, _encoded(new, memory.cache_dtype)

    layers = llama.with_constants(params.layers, config)
    x, (k, v) = lax.scan(step, llama.embed_tokens(params.embed, batch.tokens), layers)
    cache = KVCache(k, v, batch.positions, batch.segment_ids)
    return cache, _logits_after(params, config, x, batch.positions, batch.last)


def _encoded(new, dtype):
    """New keys and values, each [B, T, K, H], as a cache of the dtype keeps them [B, K, T, H]."""
    return tuple(kv_cache.encode(x.swapaxes(1, 2), dtype) for x in new)


def _logits_after(params, config, x, positions, last):
    """Float32 logits [B, V] after the position last [B] of x [B, T, D]."""
    # A masked sum selects one token per row, on whichever device holds it: exactly, without a gather.
    x = jnp.where((positions == last[:, None])[:, :, None], x, 0).sum(1)
    return _next_logits(params, config, x)


@jax.named_scope('lm_head')
def _next_logits(params, config, x):
    """Final norm and head of x [B, D] -> float32 [B, V]."""
    x = rms_norm(x, params.final_norm, config.norm_eps).astype(jnp.float32)
    logits = row_linear.product(x, llama.head(params).astype(jnp.float32))
    return sharding.reshard(logits, sharding.spec('BV'))


def extend(params: llama.Params, config: LlamaConfig, cache: KVCache, chunk: Chunk, logits: jax.Array,
           tables: rope.Tables, memory: Memory, stationary: bool = False) -> tuple[KVCache, jax.Array]:
    """Run a chunk of tokens that follow those in the cache.

    Args:
      stationary: as in extend_states.
      logits: float32 [B, V], kept for rows whose last token is before the chunk.
    Returns:
      the cache with the chunk in it, and float32 logits [B, V] that follow the last token of every row.
    """
    cache, x = extend_states(params, config, cache, chunk, tables, memory, stationary)
    in_chunk = ((chunk.positions == chunk.last[:, None]) & (chunk.segment_ids > 0)).any(1)
    # Padding has positions too, and the position of the last token may be among them.
    positions = jnp.where(chunk.segment_ids > 0, chunk.positions, -1)
    new = _logits_after(params, config, x, positions, chunk.last)
    return cache, jnp.where(in_chunk[:, None], new, logits)


def extend_states(params: llama.Params, config: LlamaConfig, cache: KVCache, chunk: Chunk,
                  tables: rope.Tables, memory: Memory, stationary: bool = False,
                  ) -> tuple[KVCache, jax.Array]:
    """The cache with a chunk of tokens in it, and the hidden states [B, T, D] of the chunk after all layers,
    before the final norm.

    The queries are gathered to the cache instead of the other way round, so that the cost of the network
    grows with the chunk and not with the context (Yang et al. 2024, "Context Parallelism for Scalable
    Million-Token Inference"). stationary: whether the tokens are gathered to the weights too, which are then
    those of row_linear.for_chunks; a short chunk is smaller than they are.
    """
    angles = rope.angles(tables, chunk.positions)
    linear, feed_forward, embed = llama.linear, functools.partial(
        llama.ffn, num_chunks=memory.ffn_chunks), llama.embed_tokens
    if stationary:
        linear, feed_forward, embed = row_linear.chunk_linear, row_linear.chunk_mlp, embed_row_tokens
    # Slots from the beginning of the chunk on may hold an earlier question, which this one replaces.
    segments = jnp.where(cache.positions < chunk.positions.min(1, keepdims=True), cache.segment_ids, 0)

    def step(x, inputs):
        layer, cached_k, cached_v = inputs
        cached = cached_k, cached_v, cache.positions, segments

        def attend(q, k, v):
            own = k.swapaxes(1, 2), v.swapaxes(1, 2), chunk.positions, chunk.segment_ids
            return attend_chunk(q, own, cached, memory.attention, config.window)

        x, new = llama.block(x, layer, angles, config, attend, linear=linear, feed_forward=feed_forward)
        return x, _encoded(new, kv_cache.dtype_of(cache))

    x = embed(params.embed, chunk.tokens)
    x, (k, v) = lax.scan(step, x, (llama.with_constants(params.layers, config), cache.k, cache.v))
    k, v = jax.tree.map(lambda x: sharding.reshard(x, P(None, sharding.BATCH_AXES, 'tensor')), (k, v))
    return write(cache, k, v, chunk.slots), x


# ---------------------------------------------------------------------------------------------------
# Decoding
# ---------------------------------------------------------------------------------------------------


def decode_step(params: llama.Params, config: LlamaConfig, cache: KVCache, tokens: jax.Array,
                positions: jax.Array, slots: jax.Array, tables: rope.Tables) -> tuple[KVCache, jax.Array]:
    """One more token per row.

    Args:
      tokens, positions: int32 [B], the new tokens and their logical positions.
      slots: int32 [B], where the layout puts those positions in the cache.
    Returns:
      the cache with the new tokens in it, and the float32 logits [B, V] that follow them.
    """
    angles = [x[:, 0] for x in rope.angles(tables, positions[:, None])]  # [B, 1, H/2]
    mask = (cache.segment_ids > 0) & (cache.positions < positions[:, None])
    if config.window is not None:
        mask &= cache.positions > positions[:, None] - config.window

    def step(x, inputs):
        layer, number = inputs

        def attend(q, k, v):
            return attend_cache(q, k, v, cache, number, mask)

        x, new = llama.block(x, layer, angles, config, attend, linear=row_linear.linear,
                             feed_forward=row_linear.mlp)
        return x, _encoded((y[:, None] for y in new), kv_cache.dtype_of(cache))

    x = embed_row_tokens(params.embed, tokens)
    # The cache is only read inside the loop over layers, by tiles, and written once after it: as a carry or
    # an output of a scan all of it would be copied for every token, as an input every layer.
    if isinstance(params.layers, tuple):
        new, step = [], jax.jit(step)  # traced once for all layers
        for inputs in zip(params.layers, jnp.arange(config.num_layers), strict=True):
            x, kv = step(x, inputs)
            new.append(kv)
        # The write must depend on the last layer's reading, or XLA would copy the cache for every token.
        slots = jnp.where(jnp.isnan(x).any(1), cache.positions.shape[1], slots)
        k, v = jax.tree.map(lambda *leaves: jnp.stack(leaves), *new)
    else:
        layers = llama.with_constants(params.layers, config)
        x, (k, v) = lax.scan(step, x, (layers, jnp.arange(config.num_layers)))
    return write(cache, k, v, slots[:, None]), _next_logits(params, config, x)


def decode(params: llama.Params, config: LlamaConfig, cache: KVCache, logits: jax.Array, last: jax.Array,
           slot_of: jax.Array, request: Request, tables: rope.Tables) -> tuple[KVCache, jax.Array, jax.Array]:
    """Decode until every row has reached its limit or a stop token.

    Args:
      logits: float32 [B, V], after the position last, int32 [B], of every row.
      slot_of: int32 [S], the slot of each position.
    Returns:
      the cache, tokens int32 [B, max_new_tokens] (0 where a row has ended) and their counts int32 [B].
    """
    params = row_linear.for_decoding(params, config)  # once, not for every token

    def append(i, token, tokens, counts, active):
        tokens = lax.dynamic_update_slice_in_dim(tokens, jnp.where(active, token, 0)[:, None], i, 1)
        counts += active
        return tokens, counts, active & ~rows_at(request.stop, token) & (counts < request.limits)

    def step(carry):
        i, cache, token, *rest = carry
        positions = last + i
        slots = rows_at(slot_of, positions)
        cache, logits = decode_step(params, config, cache, token, positions, slots, tables)
        token = next_token(logits, i, request.sampling, request.key)
        return i + 1, cache, token, *append(i, token, *rest)

    tokens = jnp.tile(jnp.zeros_like(last)[:, None], (1, request.max_new_tokens))
    token = next_token(logits, 0, request.sampling, request.key)
    start = 1, cache, token, *append(0, token, tokens, jnp.zeros_like(last), request.limits > 0)
    _, cache, _, tokens, counts, _ = lax.while_loop(lambda carry: carry[-1].any(), step, start)
    return cache, tokens, counts


def rows_at(x: jax.Array, indices: jax.Array) -> jax.Array:
    """x [n] at indices int32 [B], sharded like rows: stop flags by token, or slots by position."""
    if sharding.current_mesh() is None:
        return x[indices]
    return x.at[indices].get(out_sharding=sharding.spec('B'))


# ---------------------------------------------------------------------------------------------------
# Generation
# ---------------------------------------------------------------------------------------------------


def generate(params: llama.Params, config: LlamaConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int,
             *, indices: np.ndarray | None = None, memory: Memory | None = None, stop_id: int | None = None,
             batch_size: int | None = None) -> np.ndarray:
    """Greedy continuations, prefill and all decode steps in one compiled program.

    The program depends on config.architecture() and on the shapes alone, so that a model before and after
    extension shares it. 'dynamic' and 'longrope' scaling depend on the longest prompt with its new tokens.

    Args:
      prompts: B lists of token ids, of any lengths.
      indices: [S], the permutation of the layout over the slots of the cache, a multiple of length_unit;
        default contiguous, with cache_len of the tokens that are needed.
      memory: only its attention and ffn_chunks are used.
      stop_id: everything after its first occurrence becomes stop_id.
      batch_size: rows computed at a time; default all. The last group is padded to it.
    Returns:
      numpy int32 [B, max_new_tokens].
    Raises:
      ValueError: for prompts that cannot be continued, or a cache that does not hold them or does not divide.
    """
    memory = memory or Memory()
    check_prompts(prompts, max_new_tokens, config.vocab_size)
    seq_len, needed = _cache_slots(prompts, max_new_tokens, indices, memory)
    rows = sharding.axis_size('data') * sharding.axis_size('fsdp')
    batch_size = -(-(batch_size or len(prompts)) // rows) * rows
    tables = rope.make_tables(rope_at(config.rope, config.head_dim, needed), config.head_dim, seq_len)
    stop = np.zeros(config.vocab_size, bool)
    if stop_id is not None:
        stop[stop_id] = True
    groups = []
    for start in range(0, len(prompts), batch_size):
        group = prompts[start:start + batch_size]
        limits = np.zeros(batch_size, np.int32)
        limits[:len(group)] = max_new_tokens
        batch = place(arrange([*group, *[[0]] * (batch_size - len(group))], seq_len, indices))
        request = place_request(limits, stop, max_new_tokens)
        new, counts = _generate(params, config.architecture(), batch, request, tables, memory)
        new, counts = sharding.fetch(new)[:len(group)], sharding.fetch(counts)[:len(group), None]
        # A row that has stopped ends in the token that stopped it.
        groups.append(np.where(np.arange(max_new_tokens) < counts, new, -1 if stop_id is None else stop_id))
    return np.concatenate(groups).astype(np.int32)


def _cache_slots(prompts, max_new_tokens, indices, memory):
    """-> (slots of the cache, tokens of the longest prompt with its answer that they must hold)."""
    longest = max(map(len, prompts))
    needed = longest + max_new_tokens - 1  # the last new token is never fed back
    ring_size = sharding.axis_size('sequence')
    unit = length_unit(ring_size, memory.ffn_chunks)
    seq_len = cache_len(needed, ring_size, memory.ffn_chunks) if indices is None else len(indices)
    if seq_len < needed or seq_len % unit:
        raise ValueError(
            f'the {seq_len} slots of indices must be a multiple of {unit} (ring_size {ring_size}, ffn_chunks '
            f'{memory.ffn_chunks}) and hold the longest prompt {longest} + max_new_tokens '
            f'{max_new_tokens} - 1 = {needed}; use {-(-needed // unit) * unit} or more'
        )
    return seq_len, needed


@functools.partial(jax.jit, static_argnames=('config', 'memory'))
def _generate(params, config, batch, request, tables, memory):
    cache, logits = prefill(params, config, batch, tables, memory)
    return decode(params, config, cache, logits, batch.last, batch.slot_of, request, tables)[1:]
