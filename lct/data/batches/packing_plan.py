"""What each training sequence consists of, from the lengths of the documents alone: no token is read.

A mode is a function (lengths int64 [n], seq_len, rng) -> Plan:

    packed        whole documents, best fit; a longer one fills sequences of its own, its tail is packed
    alone         the same, but a document of at least half a sequence has it to itself
    concatenated  one after the other, cut wherever a sequence ends and continued in the next
    joined        concatenated, and documents see those before them in their sequence
    truncated     packed, without what a document has beyond seq_len: the one mode that leaves out tokens

In all of them the parts of a document come in its own order, and no target crosses a document.
"""

import bisect
from typing import NamedTuple

import numpy as np

from lct.data.sequence import Sequence

MODES = ('packed', 'alone', 'concatenated', 'joined', 'truncated')


class Plan(NamedTuple):
    """Sequence r consists of the pieces first[r]..first[r + 1]: tokens start..stop of a document each.

    document, start, stop: int64 [pieces]; first: int64 [sequences + 1]; joined: whether the documents of a
    sequence see each other.
    """

    document: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    first: np.ndarray
    joined: bool = False

    @property
    def num_sequences(self):
        return len(self.first) - 1


def packed(lengths, seq_len, rng):
    """Best fit, longest first (Ding et al. 2024, "Fewer Truncations Improve Language Modeling")."""
    tails = lengths % seq_len
    return _arranged(lengths, seq_len, best_fit(tails, seq_len), rng)


def alone(lengths, seq_len, rng, at_least=0.5):
    """at_least: the fraction of a sequence from which on a document, or its tail, is not given company."""
    tails = lengths % seq_len
    long = tails >= at_least * seq_len
    rows = best_fit(np.where(long, 0, tails), seq_len)
    rows[long] = rows.max(initial=-1) + 1 + np.arange(long.sum())
    return _arranged(lengths, seq_len, rows, rng)


def concatenated(lengths, seq_len, rng):
    """rng is not used: the documents stay in their order."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    starts = ends - lengths
    begins = np.union1d(starts[lengths > 0], np.arange(0, total, seq_len))
    document = np.searchsorted(ends, begins, side='right')
    start = begins - starts[document]
    stop = np.append(begins[1:], total) - starts[document]
    first = np.searchsorted(begins, np.arange(0, total + seq_len, seq_len))
    return Plan(document, start, stop, first)


def joined(lengths, seq_len, rng):
    return concatenated(lengths, seq_len, rng)._replace(joined=True)


def truncated(lengths, seq_len, rng):
    return packed(np.minimum(lengths, seq_len), seq_len, rng)


def best_fit(lengths, seq_len):
    """-> int64 [n]: the row of each document, longest first, each where it leaves the least room; -1 for length 0.

    lengths int64 [n], none above seq_len. O(n log rows), whatever the number of tokens.
    """
    rows = np.full(len(lengths), -1, np.int64)
    order = np.argsort(-lengths, kind='stable')
    order = order[lengths[order] > 0]
    rooms, owners, num_rows = [], [], 0  # of the rows with room left, by room
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


def _arranged(lengths, seq_len, tail_row, rng):
    """The Plan of full sequences of long documents and of rows of tails (tail_row int64 [n], -1: no tail), in
    random order, but the parts of a document in its own."""
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


def remaining(plan, sequence, num_documents):
    """-> (begin, end) int64 [num_documents]: what of each document is left from a sequence of the plan on; equal
    where nothing is. One range each, because the parts of a document come in order."""
    pieces = slice(plan.first[sequence], None)
    begin = np.full(num_documents, np.iinfo(np.int64).max)
    end = np.zeros(num_documents, np.int64)
    np.minimum.at(begin, plan.document[pieces], plan.start[pieces])
    np.maximum.at(end, plan.document[pieces], plan.stop[pieces])
    return np.minimum(begin, end), end


def sequence_of(plan, r, documents, begin, lengths):
    """Sequence r of a plan over documents int64 [n] of a store: begin int64 [n], where in each the plan's token 0
    lies; lengths int64 [n], of the whole documents."""
    pieces = slice(plan.first[r], plan.first[r + 1])
    which = plan.document[pieces]
    start, stop = plan.start[pieces] + begin[which], plan.stop[pieces] + begin[which]
    n = stop - start
    count = len(which)
    return Sequence(
        document=documents[which], start=start, stop=stop,
        segment=np.ones(count, np.int32) if plan.joined else np.arange(1, count + 1, dtype=np.int32),
        position=np.cumsum(n) - n if plan.joined else np.zeros(count, np.int64),
        weight=np.ones(count, np.float32), follows=np.zeros(count, bool), continues=stop < lengths[which],
    )


def stats(plan, seq_len):
    """{'sequences', 'tokens', 'padding', 'waste', 'cut'}: waste is the padding's share of all places; cut, how
    many pieces begin inside their document."""
    tokens = int((plan.stop - plan.start).sum())
    places = plan.num_sequences * seq_len
    return {'sequences': plan.num_sequences, 'tokens': tokens, 'padding': places - tokens,
            'waste': (places - tokens) / places if places else 0.0, 'cut': int((plan.start > 0).sum())}
