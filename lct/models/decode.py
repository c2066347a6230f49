"""Generation from long prompts: ring prefill straight into a sharded key/value cache, then decode.

The cache is split over 'sequence' and never moves: every device attends to its own part with each new
query, and one log-sum-exp merge per layer puts the parts together. A prompt that is too long for one forward is
read in pieces, and a text that was read once serves any number of questions (extend).

Letters: B batch, S cache slots, N query heads, K key/value heads, G = N / K, H head_dim, D embed_dim,
F mlp_dim, V vocab, L layers.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from lct import sharding
from lct.models import llama
from lct.models.kv_cache import KVCache, attend_cache, attend_piece, write
from lct.models.sampling import choose
from lct.ops import rope
from lct.ops.norms import rms_norm


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
        out = llama.attention(q, k, v, positions, segment_ids, memory.attention, config.window)
        x = x + sharding.einsum('BTNH,NHD->BTD', out, layer.wo)
        return x + llama.ffn(x, layer, config, memory.ffn_chunks), (k.swapaxes(1, 2), v.swapaxes(1, 2))

    x, (k, v) = lax.scan(block, llama.embed_tokens(params.embed, tokens), params.layers)
    return KVCache(k, v, positions, segment_ids), _logits_after(params, config, x, positions, last)


def _logits_after(params, config, x, positions, last):
    """Float32 logits [B, V] after the position last [B] of x [B, T, D]."""
    # One row of x each, wherever it lies: a masked sum is exact and leaves 'sequence' where it is.
    x = jnp.where((positions == last[:, None])[:, :, None], x, 0).sum(1)
    return _next_logits(params, config, x)


def _next_logits(params, config, x):
    """Final norm and head of x [B, D] -> float32 [B, V]."""
    x = rms_norm(x, params.final_norm, config.norm_eps).astype(jnp.float32)
    return sharding.einsum('BD,DV->BV', x, llama.head(params).astype(jnp.float32))


# ---------------------------------------------------------------------------------------------------
# One token, a piece, many tokens
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
    if config.window is not None:
        seen &= cache.positions > positions[:, None] - config.window

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
    return write(cache, k[:, :, :, None], v[:, :, :, None], slots[:, None]), _next_logits(params, config, x)


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


def extend(params, config, cache, tokens, positions, segment_ids, slots, last, logits, tables, memory):
    """A piece of T more tokens per row: of a prompt that is read in pieces, or a question about what was read.

    The queries visit the cache instead of the other way round, so that the cost of the network grows with the
    piece and not with the context (Yang et al. 2024, "Context Parallelism for Scalable Million-Token Inference").

    Args:
      tokens, positions, segment_ids: int32 [B, T] with segment 0 for padding; T is a multiple of length_unit.
      slots: int32 [B, T], where the layout puts the positions; for padding a number past the cache.
      last, logits: int32 [B] and float32 [B, V]: rows whose position last is in this piece get new logits.
    Returns:
      the cache with the piece in it, and logits.
    """
    angles = rope.angles(tables, positions)

    def block(x, inputs):
        layer, cached_k, cached_v = inputs
        q, k, v = llama.project_qkv(x, layer, angles, config)
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        own = k, v, positions, segment_ids
        cached = cached_k, cached_v, cache.positions, cache.segment_ids
        out = attend_piece(q, own, cached, memory.attention, config.window)
        x = x + sharding.einsum('BTNH,NHD->BTD', out, layer.wo)
        return x + llama.ffn(x, layer, config, memory.ffn_chunks), (k, v)

    x, (k, v) = lax.scan(block, llama.embed_tokens(params.embed, tokens), (params.layers, cache.k, cache.v))
    here = ((positions == last[:, None]) & (segment_ids > 0)).any(1)
    # Padding has a position too, which may be the last one's.
    new = _logits_after(params, config, x, jnp.where(segment_ids > 0, positions, -1), last)
    k, v = (sharding.reshard(x, P(None, sharding.BATCH_AXES, 'tensor')) for x in (k, v))
    return write(cache, k, v, slots), jnp.where(here[:, None], new, logits)


def decode(params, config, cache, logits, last, slot_of, limits, stop, tables, max_new_tokens, sampling=None,
           key=None):
    """Tokens until every row has met its limit or a token that stops it.

    Args:
      logits: float32 [B, V], what follows the position last [B] of every row.
      slot_of: int32 [S], the slot of each position.
      limits: int32 [B], new tokens of each row, up to max_new_tokens; 0 for a row that nobody asked for.
      stop: bool [V], the tokens that end a row; the one that did is its last.
      sampling, key: as in sampling.choose.
    Returns:
      the cache, tokens int32 [B, max_new_tokens] (0 where a row has ended) and their numbers [B].
    """
    # Weights that are split over the ring come together once and not for every token.
    params = gathered(params, config)

    def take(i, token, tokens, counts, active):
        tokens = lax.dynamic_update_slice_in_dim(tokens, jnp.where(active, token, 0)[:, None], i, 1)
        counts += active
        return tokens, counts, active & ~rows_at(stop, token) & (counts < limits)

    def step(carry):
        i, cache, token, *rest = carry
        positions = last + i
        slots = rows_at(slot_of, positions)
        cache, logits = decode_step(params, config, cache, token, positions, slots, tables)
        token = choose(logits, i, sampling, key)
        return i + 1, cache, token, *take(i, token, *rest)

    tokens = jnp.tile(jnp.zeros_like(last)[:, None], (1, max_new_tokens))
    token = choose(logits, 0, sampling, key)
    start = 1, cache, token, *take(0, token, tokens, jnp.zeros_like(last), limits > 0)
    _, cache, _, tokens, counts, _ = lax.while_loop(lambda carry: carry[-1].any(), step, start)
    return cache, tokens, counts


def gathered(params, config):
    """The weights as decode_step uses them, whole on every device but for 'tensor'."""
    if sharding.current_mesh() is None:
        return params
    rules = {**sharding.WEIGHT_RULES, 'D': None}

    def whole(entry, w):
        return jax.reshard(w, P(*map(rules.get, entry.letters)))

    params = jax.tree.map(whole, llama.table(config), params, is_leaf=lambda x: isinstance(x, llama.Entry))
    return params.replace(embed=jax.reshard(params.embed, P(None, None)))


def rows_at(x, indices):
    """x [n] at indices [B], split as rows are: the stop flag of each token, the slot of each position."""
    if sharding.current_mesh() is None:
        return x[indices]
    return x.at[indices].get(out_sharding=sharding.spec('B'))


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


def place(batch):
    """The arrays of arrange on the current mesh."""
    specs = {'last': sharding.spec('B'), 'slot_of': P(None)}
    return {name: sharding.put(x, specs.get(name, sharding.spec('BS'))) for name, x in batch.items()}


def check_prompts(prompts, max_new_tokens, vocab_size):
    """Refuse what cannot be continued."""
    lengths = [len(prompt) for prompt in prompts]
    if not lengths or min(lengths) < 1 or max_new_tokens < 1:
        raise ValueError(
            f'generate needs prompts of at least one token and max_new_tokens of at least 1, got lengths '
            f'{lengths[:8]} and max_new_tokens {max_new_tokens}; give an empty prompt its BOS'
        )
    check_ids(prompts, vocab_size)


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
    check_prompts(prompts, max_new_tokens, config.vocab_size)
    longest = max(map(len, prompts))
    needed = longest + max_new_tokens - 1  # the last new token is never fed back
    ring_size = sharding.axis_size('sequence')
    multiple = length_unit(ring_size, memory.ffn_chunks)
    if seq_len is None:
        seq_len = cache_len(needed, ring_size, memory.ffn_chunks)
    if seq_len < needed or seq_len % multiple:
        raise ValueError(
            f'seq_len {seq_len} must be a multiple of {multiple} (ring_size {ring_size}, ffn_chunks '
            f'{memory.ffn_chunks}) and hold the longest prompt {longest} + max_new_tokens '
            f'{max_new_tokens} - 1 = {needed}; use {-(-needed // multiple) * multiple} or more'
        )
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
        new, counts = _generate(params, config.architecture(), batch, *place_limits(limits, stop), tables, memory,
                                max_new_tokens)
        new, counts = sharding.fetch(new)[:len(group)], sharding.fetch(counts)[:len(group), None]
        # A row that has stopped ends in the token that stopped it.
        groups.append(np.where(np.arange(max_new_tokens) < counts, new, -1 if stop_id is None else stop_id))
    return np.concatenate(groups).astype(np.int32)


def place_limits(limits, stop):
    """limits [B] and stop [V] on the current mesh."""
    return sharding.put(limits, sharding.spec('B')), sharding.put(stop, P(None))


@functools.partial(jax.jit, static_argnames=('config', 'memory', 'max_new_tokens'))
def _generate(params, config, batch, limits, stop, tables, memory, max_new_tokens):
    cache, logits = prefill(params, config, batch['tokens'], batch['positions'], batch['segment_ids'],
                            batch['last'], tables, memory)
    return decode(params, config, cache, logits, batch['last'], batch['slot_of'], limits, stop, tables,
                  max_new_tokens)[1:]
