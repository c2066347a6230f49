"""Batches of prompts of like length: few shapes, so few compiled programs."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import NamedTuple

from lct import sharding
from lct.models import prompt_layout
from lct.ops import rope

ROPE_BY_LENGTH = ('dynamic', 'longrope')  # RoPE scalings that depend on the longest prompt of a batch


class Batch(NamedTuple):
    """Prompts that are run together.

    indices: their places in the list that was batched. rows: the batch size, padding rows included. seq_len:
    cache slots of each row. longest: tokens of the longest prompt with its answer.
    """

    indices: list[int]
    rows: int
    seq_len: int
    longest: int


def replicas() -> int:
    """Groups of devices of the current mesh that compute rows of their own."""
    return sharding.axis_size('data') * sharding.axis_size('fsdp')


def power_of_two_slots(length: int, smallest: int, ffn_chunks: int = 1) -> int:
    """Cache slots for `length` tokens: a power of two, `smallest` or more, rounded up for the mesh."""
    slots = max(1 << (length - 1).bit_length(), smallest)
    return prompt_layout.cache_len(slots, sharding.axis_size('sequence'), ffn_chunks)


def batches(lengths: Sequence[int], seq_lens: Sequence[int], scaling: rope.RopeConfig, batch_tokens: int,
            kinds: Sequence[Hashable] | None = None,
            order: Callable[[int, int], tuple] | None = None) -> Iterator[Batch]:
    """Group prompts by their cache length, in the order in which the lengths first occur.

    Args:
      lengths: tokens of each prompt with its answer; seq_lens: the cache slots of each.
      scaling: prompts of different lengths share no batch where its type depends on the longest prompt.
      batch_tokens: cache slots of one batch; prompts longer than this run one on each replica.
      kinds: prompts of different kinds share no batch.
      order: (index, rows) -> the key that a group is sorted by before it is cut into batches of `rows`.
    """
    groups = {}
    for i, (length, seq_len) in enumerate(zip(lengths, seq_lens, strict=True)):
        same_rope = length if scaling.type in ROPE_BY_LENGTH else None
        groups.setdefault((seq_len, same_rope, kinds and kinds[i]), []).append(i)
    for (seq_len, *_), group in groups.items():
        most = max(batch_tokens // (seq_len * replicas()), 1) * replicas()
        # Batches of one shape, with as few padding rows as their number allows.
        rows = -(-len(group) // -(-len(group) // most))
        rows = -(-rows // replicas()) * replicas()
        if order is not None:
            group.sort(key=lambda i: order(i, rows))
        for start in range(0, len(group), rows):
            indices = group[start:start + rows]
            yield Batch(indices, rows, seq_len, max(lengths[i] for i in indices))
