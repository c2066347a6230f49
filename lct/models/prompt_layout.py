"""Prompts on the host: checked, padded, and laid out as the slots of a cache.

Letters: B batch, S cache slots.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from lct import sharding
from lct.ops import rope


class PromptBatch(NamedTuple):
    """Right-padded prompts in the order of a layout: int32 arrays of numpy, or of jax after place.

    tokens, positions, segment_ids: [B, S], where segment 0 marks slots without a token yet; their positions
      are already set.
    last: [B], the position of each row's last prompt token.
    slot_of: [S], the slot of each position.
    """

    tokens: jax.Array | np.ndarray
    positions: jax.Array | np.ndarray
    segment_ids: jax.Array | np.ndarray
    last: jax.Array | np.ndarray
    slot_of: jax.Array | np.ndarray


class Chunk(NamedTuple):
    """T more tokens per row: a prefill chunk, or a question about the text before it.

    tokens, positions, segment_ids: int32 [B, T], segment 0 for padding; T is a multiple of length_unit.
    slots: int32 [B, T], where the layout puts the positions; for padding a number past the cache.
    last: int32 [B], the position of the last token of a row, in this chunk or before it.
    """

    tokens: jax.Array
    positions: jax.Array
    segment_ids: jax.Array
    slots: jax.Array
    last: jax.Array


def arrange(prompts: Sequence[Sequence[int]], seq_len: int, indices: np.ndarray | None = None) -> PromptBatch:
    """The PromptBatch of B prompts, lists of token ids of any lengths up to seq_len.

    indices: [S], the permutation of the layout: slot i holds position indices[i]. None for 0..S-1.

    Raises:
      ValueError: for indices that are not a permutation of the slots.
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
    return PromptBatch(
        tokens=tokens[:, indices],
        positions=np.tile(indices.astype(np.int32), (len(prompts), 1)),
        segment_ids=(indices < lengths[:, None]).astype(np.int32),
        last=(lengths - 1).astype(np.int32),
        slot_of=np.argsort(indices).astype(np.int32),
    )


def place(batch: PromptBatch) -> PromptBatch:
    """The batch on the current mesh: B over the batch axes, S over 'sequence'."""
    specs = PromptBatch(*[sharding.spec('BS')] * 3, last=sharding.spec('B'), slot_of=P(None))
    return PromptBatch(*map(sharding.put, batch, specs))


def place_chunk(texts: Sequence[Sequence[int]], lengths: np.ndarray, size: int, slot_of: np.ndarray) -> Chunk:
    """The Chunk of up to `size` tokens of each row, which follow lengths [B] others, on the current mesh.

    slot_of: [S], the slot of each position.
    """
    sizes = np.array([len(text) for text in texts])
    columns = np.arange(size)
    positions = np.minimum(lengths[:, None] + columns, len(slot_of) - 1)
    filled = columns < sizes[:, None]
    tokens = np.array([[*text, *[0] * (size - len(text))] for text in texts])
    slots = np.where(filled, slot_of[positions], len(slot_of))
    put = lambda x, letters: sharding.put(x.astype(np.int32), sharding.spec(letters))
    return Chunk(tokens=put(tokens, 'BT'), positions=put(positions, 'BT'), segment_ids=put(filled, 'BT'),
                 slots=put(slots, 'B'), last=put(lengths + sizes - 1, 'B'))


def length_unit(ring_size: int, ffn_chunks: int) -> int:
    """Sequence lengths are multiples of this: two halves per device, and FFN chunks that span the ring."""
    return math.lcm(2 * ring_size, ring_size * ffn_chunks)


def cache_len(length: int, ring_size: int, ffn_chunks: int = 1) -> int:
    """Cache slots for length tokens: a multiple of 2 * ring_size * ffn_chunks. Above 64 * 2 * ring_size
    tokens it is a multiple of that too, so that attention finds chunks that divide a device's shard."""
    unit, attention_unit = 2 * ring_size * ffn_chunks, 64 * 2 * ring_size
    if length > attention_unit:
        unit = math.lcm(unit, attention_unit)
    return -(-length // unit) * unit


def rope_at(config: rope.RopeConfig, head_dim: int, length: int) -> rope.RopeConfig:
    """The RopeConfig with its scaling fixed for texts of length tokens, however long the tables are:
    'dynamic' and 'longrope' would otherwise scale for the empty slots at the end of a cache."""
    if config.type == 'dynamic':
        theta = config.theta
        if length > config.max_position:
            theta = rope.dynamic_ntk_theta(
                theta, config.max_position, length, alpha=config.factor, head_dim=head_dim)
        return dataclasses.replace(config, type='default', theta=theta, factor=1.0, max_position=None)
    if config.type == 'longrope':
        factors = config.long_factor if length > config.original_max_position else config.short_factor
        return dataclasses.replace(config, long_factor=factors, short_factor=factors)
    return config


def check_ids(rows: Iterable[Sequence[int]], vocab_size: int) -> None:
    """Check that all token ids are 0 .. vocab_size - 1: a device would silently clamp a wrong id.

    Raises:
      ValueError: naming the first id outside the vocabulary, its row and column.
    """
    for i, ids in enumerate(rows):
        ids = np.asarray(ids)
        bad = np.flatnonzero((ids < 0) | (ids >= vocab_size))
        if bad.size:
            raise ValueError(
                f'token id {ids[bad[0]]} in row {i}, column {bad[0]} is not in 0..{vocab_size - 1}; use the '
                "tokenizer of the model's checkpoint"
            )


def check_prompts(prompts: Sequence[Sequence[int]], max_new_tokens: int, vocab_size: int) -> None:
    """Check that every prompt can be continued.

    Raises:
      ValueError: for empty prompts, no new tokens, or ids outside the vocabulary.
    """
    lengths = [len(prompt) for prompt in prompts]
    if not lengths or min(lengths) < 1 or max_new_tokens < 1:
        raise ValueError(
            f'generate needs prompts of at least one token and max_new_tokens of at least 1, got lengths '
            f'{lengths[:8]} and max_new_tokens {max_new_tokens}; give an empty prompt its BOS'
        )
    check_ids(prompts, vocab_size)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many token ids two texts have in common from their beginning."""
    shortest = min(len(a), len(b))
    differs = np.flatnonzero(np.asarray(a[:shortest]) != np.asarray(b[:shortest]))
    return int(differs[0]) if differs.size else shortest


def reading_order(texts: Sequence[Sequence[int]]) -> list[int]:
    """Indices of the texts in an order in which every text begins as much as possible like the one before it.

    A cache that keeps what consecutive texts have in common then reads the fewest tokens: those of the tree
    of all beginnings, each once. Long branches come before short ones, so that groups of like form, read side
    by side, take steps of like length.
    """
    ascending = sorted(range(len(texts)), key=lambda i: list(texts[i]))
    adjacent = [common_prefix(texts[i], texts[j]) for i, j in itertools.pairwise(ascending)]
    shared = np.zeros((len(texts), len(texts)), int)
    for i, first in enumerate(ascending[:-1]):  # two texts share the least of what lies between them
        others = ascending[i + 1:]
        shared[first, others] = shared[others, first] = np.minimum.accumulate(adjacent[i:])
    left = list(range(len(texts)))
    order = [left.pop(int(shared.sum(1).argmax()))] if left else []
    while left:
        order.append(left.pop(int(shared[order[-1], left].argmax())))
    return order
