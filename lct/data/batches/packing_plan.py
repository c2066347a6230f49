"""Which documents form which training sequence, from the lengths of the documents alone: no token is read.

A mode is a function (lengths int64 [n], seq_len, rng) -> Plan:

    packed        whole documents, best fit; a longer one fills sequences of its own, and its tail is packed
    alone         the same, but a document of at least half a sequence shares it with no other
    concatenated  one after the other, cut wherever a sequence ends and continued in the next
    joined        concatenated, and documents attend to the documents before them in their sequence
    truncated     packed, without the tokens of a document beyond seq_len: the only mode that drops tokens

In all modes the fragments of a document stay in order, and no target is in another document.
"""

import bisect
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from lct.data.sequence import Sequence

MODES = ('packed', 'alone', 'concatenated', 'joined', 'truncated')


class Plan(NamedTuple):
    """Sequence r consists of the fragments first[r]..first[r + 1]; each is a range of tokens of one document.

    document, start, stop: int64 [fragments]; first: int64 [sequences + 1]; joined: whether the documents of a
    sequence attend to each other.
    """

    document: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    first: np.ndarray
    joined: bool = False

    @property
    def num_sequences(self) -> int:
        return len(self.first) - 1


Mode = Callable[[np.ndarray, int, np.random.Generator], Plan]


def packed(lengths: np.ndarray, seq_len: int, rng: np.random.Generator) -> Plan:
    """Best fit, longest first (Ding et al. 2024, "Fewer Truncations Improve Language Modeling")."""
    tails = lengths % seq_len
    return _arranged(lengths, seq_len, best_fit(tails, seq_len), rng)


def alone(lengths: np.ndarray, seq_len: int, rng: np.random.Generator, at_least: float = 0.5) -> Plan:
    """at_least: a document, or its tail, of at least this fraction of a sequence shares it with no other."""
    tails = lengths % seq_len
    long = tails >= at_least * seq_len
    rows = best_fit(np.where(long, 0, tails), seq_len)
    rows[long] = rows.max(initial=-1) + 1 + np.arange(long.sum())
    return _arranged(lengths, seq_len, rows, rng)


def concatenated(lengths: np.ndarray, seq_len: int, rng: np.random.Generator) -> Plan:
    """Documents in their order; rng is not used."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    starts = ends - lengths
    begins = np.union1d(starts[lengths > 0], np.arange(0, total, seq_len))
    document = np.searchsorted(ends, begins, side='right')
    start = begins - starts[document]
    stop = np.append(begins[1:], total) - starts[document]
    first = np.searchsorted(begins, np.arange(0, total + seq_len, seq_len))
    return Plan(document, start, stop, first)


def joined(lengths: np.ndarray, seq_len: int, rng: np.random.Generator) -> Plan:
    return concatenated(lengths, seq_len, rng)._replace(joined=True)


def truncated(lengths: np.ndarray, seq_len: int, rng: np.random.Generator) -> Plan:
    return packed(np.minimum(lengths, seq_len), seq_len, rng)


def best_fit(lengths: np.ndarray, seq_len: int) -> np.ndarray:
    """int64 [n]: the row of each document, -1 for length 0.

    Longest first, each document goes to the row where it leaves the least room.

    lengths int64 [n], none above seq_len. O(n log rows), independent of the number of tokens.
    """
    rows = np.full(len(lengths), -1, np.int64)
    order = np.argsort(-lengths, kind='stable')
    order = order[lengths[order] > 0]
    rooms, owners, num_rows = [], [], 0  # room in the rows that are not full, ascending; these rows; all rows
    found = []
    for n in lengths[order].tolist():
        at = bisect.bisect_left(rooms, n)
        if at == len(rooms):
            room, row = seq_len - n, num_rows
            num_rows += 1
        else:
            room, row = rooms.pop(at) - n, owners.pop(at)
        found.append(row)
        if room:
            at = bisect.bisect_left(rooms, room)
            rooms.insert(at, room)
            owners.insert(at, row)
    rows[order] = found
    return rows


def _arranged(lengths: np.ndarray, seq_len: int, tail_row: np.ndarray, rng: np.random.Generator) -> Plan:
    """The Plan of the full sequences of long documents and the rows of tails, in random order.

    tail_row: int64 [n], -1 for no tail. The fragments of a document stay in order.
    """
    num_full = lengths // seq_len
    full = np.repeat(np.arange(len(lengths)), num_full)
    index = np.arange(len(full)) - np.repeat(np.cumsum(num_full) - num_full, num_full)
    full_keys = rng.random(len(full))
    full_keys = full_keys[np.lexsort((full_keys, full))]  # ascending within each document
    tail = np.flatnonzero(tail_row >= 0)
    tail_keys = rng.random(tail_row.max(initial=-1) + 1)
    both = tail[num_full[tail] > 0]
    np.maximum.at(tail_keys, tail_row[both], full_keys[np.cumsum(num_full)[both] - 1])

    keys = np.concatenate([full_keys, tail_keys])
    is_tail = np.arange(len(keys)) >= len(full)
    rank = np.empty(len(keys), np.int64)
    rank[np.lexsort((is_tail, keys))] = np.arange(len(keys))
    document = np.concatenate([full, tail])
    start = seq_len * np.concatenate([index, num_full[tail]])
    stop = np.minimum(start + seq_len, lengths[document])
    row = np.concatenate([rank[:len(full)], rank[len(full) + tail_row[tail]]])
    order = np.lexsort((rng.random(len(row)), row))
    first = np.searchsorted(row[order], np.arange(len(keys) + 1))
    return Plan(document[order], start[order], stop[order], first)


def remaining(plan: Plan, sequence: int, num_documents: int) -> tuple[np.ndarray, np.ndarray]:
    """(begin, end) int64 [num_documents]: what `sequence` and the sequences after it hold of each document.

    begin == end where they hold nothing. It is one range, because the fragments of a document are in order.
    """
    fragments = slice(plan.first[sequence], None)
    begin = np.full(num_documents, np.iinfo(np.int64).max)
    end = np.zeros(num_documents, np.int64)
    np.minimum.at(begin, plan.document[fragments], plan.start[fragments])
    np.maximum.at(end, plan.document[fragments], plan.stop[fragments])
    return np.minimum(begin, end), end


def sequence_of(plan: Plan, r: int, documents: np.ndarray, begin: np.ndarray,
                lengths: np.ndarray) -> Sequence:
    """Sequence r of a plan over documents int64 [n] of a store.

    begin int64 [n]: the token of each document that is token 0 of the plan.
    lengths int64 [n]: of the whole documents, with the end of text where it is a target.
    """
    fragments = slice(plan.first[r], plan.first[r + 1])
    index = plan.document[fragments]
    start, stop = plan.start[fragments] + begin[index], plan.stop[fragments] + begin[index]
    n = stop - start
    count = len(index)
    return Sequence(
        document=documents[index], start=start, stop=stop,
        segment=np.ones(count, np.int32) if plan.joined else np.arange(1, count + 1, dtype=np.int32),
        position=np.cumsum(n) - n if plan.joined else np.zeros(count, np.int64),
        weight=np.ones(count, np.float32), follows=np.zeros(count, bool), continues=stop < lengths[index],
    )


def stats(plan: Plan, seq_len: int) -> dict[str, int | float]:
    """{'sequences', 'tokens', 'padding', 'waste', 'cut'} of a plan.

    waste: padding as a fraction of all places. cut: number of fragments that begin inside their document.
    """
    tokens = int((plan.stop - plan.start).sum())
    places = plan.num_sequences * seq_len
    return {'sequences': plan.num_sequences, 'tokens': tokens, 'padding': places - tokens,
            'waste': (places - tokens) / places if places else 0.0, 'cut': int((plan.start > 0).sum())}
