"""Batches of which each process reads only what its devices hold.

A sequence is known piece by piece before it is read (sequences.Sequence). A device holds some columns of some
rows of the permuted batch; of the store are read the tokens of these columns, and the one after each run of
them, which is the target of its last token.
"""

from collections import defaultdict
from typing import NamedTuple

import numpy as np

from lct.data.batches.loader import Prefetch
from lct.data.layout import permutation


class Documents:
    """The documents of a store as the model sees them: token 0 is bos_id, if there is one.

    bos: int32 [0 or 1]. read_bytes: what was asked of the store, at four a token.
    """

    def __init__(self, store, bos_id):
        self.bos = np.array([] if bos_id is None else [bos_id], np.int32)
        self.num_bos, self.read_bytes, self._store = len(self.bos), 0, store

    def lengths(self, documents):
        """int64 [n] of documents int64 [n]; an empty document has none, not even a bos."""
        lengths = np.asarray(self._store.lengths[documents], np.int64)
        return np.where(lengths > 0, lengths + self.num_bos, 0)

    def tokens(self, document, start, stop):
        """-> int32 [stop - start]"""
        ids = self._store.tokens(int(document), max(int(start) - self.num_bos, 0), int(stop) - self.num_bos)
        self.read_bytes += 4 * len(ids)
        return np.concatenate([self.bos, ids]) if start < self.num_bos else ids


def read(sequence, documents, runs):
    """The places start..stop of each of runs, one after the other, as the dict of arrays of packing.pack.

    What lies beyond the last piece is padding: segment 0.
    """
    ends = np.cumsum(sequence.stop - sequence.start)
    begins = ends - (sequence.stop - sequence.start)
    total = sum(stop - start for start, stop in runs)
    row = {name: np.zeros(total, np.int32) for name in ('tokens', 'targets', 'positions', 'segment_ids')}
    row['loss_mask'] = np.zeros(total, np.float32)
    length = int(ends[-1]) if len(ends) else 0
    at = 0
    for start, stop in runs:
        for p in range(np.searchsorted(ends, start, 'right'), np.searchsorted(begins, stop, 'left')):
            _read_piece(row, at - start, sequence, documents, p, int(begins[p]), max(start, int(begins[p])),
                        min(stop, int(ends[p])))
        padding = np.arange(max(start, length), stop)
        row['positions'][at + padding - start] = padding - length
        at += stop - start
    return row


def _read_piece(row, shift, sequence, documents, p, begin, start, stop):
    """Fill in places start..stop of the sequence, all of piece p, which begins at place begin."""
    first, last = sequence.start[p] + start - begin, sequence.start[p] + stop - begin
    at_end = last == sequence.stop[p]
    spliced = at_end and p + 1 < len(sequence.follows) and sequence.follows[p + 1]
    known = not at_end or (sequence.continues[p] and not spliced)
    ids = _tokens(sequence, documents, p, first, last + known)
    here, n = slice(shift + start, shift + stop), stop - start
    row['tokens'][here] = ids[:n]
    following, weights = ids[1:], np.full(len(ids) - 1, sequence.weight[p])
    if spliced:
        following = np.append(following, _tokens(sequence, documents, p + 1, sequence.start[p + 1],
                                                 sequence.start[p + 1] + 1))
        weights = np.append(weights, sequence.weight[p + 1])
    row['targets'][here][:len(following)] = following
    row['loss_mask'][here][:len(following)] = weights
    row['positions'][here] = np.arange(start - begin, stop - begin) + sequence.position[p]
    row['segment_ids'][here] = sequence.segment[p]


def _tokens(sequence, documents, p, start, stop):
    if sequence.document[p] < 0:
        return sequence.ids[start:stop]
    return documents.tokens(sequence.document[p], start, stop)


class Columns(NamedTuple):
    """How a process reads a row of which it holds some slices of columns.

    runs: [(start, stop)] of places in the text's order, ascending and apart; where: {(start, stop) of
    columns: int64 indices into the runs one after the other}.
    """

    runs: list
    where: dict


def columns(indices, slices):
    """-> Columns. indices int [T]: layout.permutation; slices: {(start, stop)} of permuted columns."""
    places = {one: indices[slice(*one)] for one in slices}
    needed = np.unique(np.concatenate(list(places.values())))
    breaks = np.flatnonzero(np.diff(needed) > 1) + 1
    runs = [(int(run[0]), int(run[-1]) + 1) for run in np.split(needed, breaks)]
    return Columns(runs, {one: np.searchsorted(needed, found) for one, found in places.items()})


class Slices:
    """The parts [rows, columns] of an array [B, T] that this process holds; x[rows, columns] gives one of them:
    rows int array, columns a slice."""

    def __init__(self, dtype, num_columns):
        self.dtype, self._num_columns, self._parts = dtype, num_columns, {}

    def add(self, row, start, stop, values):
        self._parts[row, start, stop] = values

    def __getitem__(self, index):
        rows, held = index
        start, stop, _ = held.indices(self._num_columns)
        found = [self._parts[row, start, stop] for row in rows.reshape(-1).tolist()]
        return np.stack(found).reshape(*rows.shape, stop - start)


class Batch(dict):
    """name -> Slices; counts: (tokens, visible query-key pairs) of the whole batch, all processes together."""

    def __init__(self, counts):
        super().__init__()
        self.counts = counts


class ShardedLoader(Prefetch):
    """stream.StoreSource -> Batch after Batch, of which this process has read what it holds.

    held: [(rows int array, columns slice)] of the permuted batch [B, T], as jax's sharding says for the
    devices of this process; by default all of it. Every process plans every sequence (a few numbers for each
    document) and reads its own part, so all walk through the same global batches with the same state.
    """

    def __init__(self, stream, batch_size, seq_len, layout='zigzag', ring_size=1, vocab_size=None, held=None):
        super().__init__(stream, batch_size)
        self._seq_len = seq_len
        self._vocab_size = stream.tokenizer.vocab_size if vocab_size is None else vocab_size
        slices = defaultdict(set)
        for rows, part in [(np.arange(batch_size), slice(None))] if held is None else held:
            for row in rows.reshape(-1).tolist():
                slices[row].add(part.indices(seq_len)[:2])
        indices = permutation(layout, seq_len, ring_size)
        plans = {one: columns(indices, one) for one in {frozenset(one) for one in slices.values()}}
        self._columns = {row: plans[frozenset(one)] for row, one in slices.items()}

    def counts(self, batch):
        """-> (tokens, query-key pairs that are visible) of a batch."""
        return batch.counts

    def _make(self):
        sequences = [self._mixture.next_sequence(self._seq_len) for _ in range(self._batch_size)]
        tokens, pairs = zip(*(sequence.counts() for sequence in sequences), strict=True)
        batch = Batch((sum(tokens), sum(pairs)))
        for row, plan in self._columns.items():
            arrays = read(sequences[row], self._mixture.documents, plan.runs)
            self._check(arrays['tokens'])
            self._check(arrays['targets'])
            for name, values in arrays.items():
                part = batch.setdefault(name, Slices(values.dtype, self._seq_len))
                for (start, stop), where in plan.where.items():
                    part.add(row, start, stop, values[where])
        return batch, self._mixture.state

    def _check(self, ids):
        """A device would clamp a wrong id without a word."""
        if ids.min() < 0 or ids.max() >= self._vocab_size:
            wrong = ids.min() if ids.min() < 0 else ids.max()
            raise ValueError(f"the store gives token id {wrong}, which is not in 0..{self._vocab_size - 1}; tokenize "
                             "the corpus with the tokenizer of the model's checkpoint")
