"""Batches of which each process reads only the shards that its devices hold.

The fragments of a sequence are known before it is read (data.sequence.Sequence). A device holds some columns
of some rows of the permuted batch. Of the store, a process reads the tokens of these columns, and the token
after each contiguous run of them, which is the target of the last token of the run.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from lct.data.batches.loader import PrefetchingLoader, Source
from lct.data.batches.store_documents import StoreDocuments
from lct.data.layout import permutation
from lct.data.sequence import Sequence

Run = tuple[int, int]  # (start, stop) of columns


def read(sequence: Sequence, documents: StoreDocuments, runs: Iterable[Run]) -> dict[str, np.ndarray]:
    """The columns start..stop of each of runs, one after the other, as the dict of arrays of packing.pack.

    Columns beyond the last fragment are padding: segment 0.
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
            first, last = max(start, int(begins[p])), min(stop, int(ends[p]))
            out = {name: values[at - start + first:at - start + last] for name, values in row.items()}
            _read_fragment(out, sequence, documents, p, first - int(begins[p]))
        padding = np.arange(max(start, length), stop)
        row['positions'][at + padding - start] = padding - length
        at += stop - start
    return row


def _read_fragment(out: dict[str, np.ndarray], sequence: Sequence, documents: StoreDocuments, p: int,
                   offset: int) -> None:
    """Fill the arrays of out with the tokens of fragment p from its token `offset` on."""
    n = len(out['tokens'])
    first = sequence.start[p] + offset
    last = first + n
    at_end = last == sequence.stop[p]
    spliced = at_end and p + 1 < len(sequence.follows) and sequence.follows[p + 1]
    has_next = not at_end or (sequence.continues[p] and not spliced)
    ids = _tokens(sequence, documents, p, first, last + has_next)
    out['tokens'][:] = ids[:n]
    following, weights = ids[1:], np.full(len(ids) - 1, sequence.weight[p])
    if spliced:
        start = sequence.start[p + 1]
        following = np.append(following, _tokens(sequence, documents, p + 1, start, start + 1))
        weights = np.append(weights, sequence.weight[p + 1])
    out['targets'][:len(following)] = following
    out['loss_mask'][:len(following)] = weights
    out['positions'][:] = np.arange(offset, offset + n) + sequence.position[p]
    out['segment_ids'][:] = sequence.segment[p]


def _tokens(sequence: Sequence, documents: StoreDocuments, p: int, start: int, stop: int) -> np.ndarray:
    if sequence.document[p] < 0:
        return sequence.ids[start:stop]
    return documents.tokens(sequence.document[p], start, stop)


class ReadPlan(NamedTuple):
    """How a process reads a row of which it holds some slices of permuted columns.

    runs: (start, stop) of columns in the order of the text, ascending and disjoint. indices: for each slice
    (start, stop) that the process holds, int64 indices into the concatenated runs.
    """

    runs: list[Run]
    indices: dict[Run, np.ndarray]


def read_plan(permuted: np.ndarray, slices: Iterable[Run]) -> ReadPlan:
    """permuted int [T]: layout.permutation. slices: of permuted columns."""
    columns = {one: permuted[slice(*one)] for one in slices}
    needed = np.unique(np.concatenate(list(columns.values())))
    breaks = np.flatnonzero(np.diff(needed) > 1) + 1
    runs = [(int(run[0]), int(run[-1]) + 1) for run in np.split(needed, breaks)]
    return ReadPlan(runs, {one: np.searchsorted(needed, found) for one, found in columns.items()})


class ShardedArray:
    """The shards of an array [B, T] that this process holds.

    x[rows, columns] gives a shard: rows is an int array, columns a slice.
    """

    def __init__(self, dtype: np.dtype, num_columns: int):
        self.dtype, self._num_columns, self._shards = dtype, num_columns, {}

    def add(self, row: int, start: int, stop: int, values: np.ndarray) -> None:
        self._shards[row, start, stop] = values

    def __getitem__(self, index: tuple[np.ndarray, slice]) -> np.ndarray:
        rows, columns = index
        start, stop, _ = columns.indices(self._num_columns)
        found = [self._shards[row, start, stop] for row in rows.reshape(-1).tolist()]
        return np.stack(found).reshape(*rows.shape, stop - start)


class ShardedBatch(dict):
    """{name: ShardedArray}. sequences: of the whole batch, which all processes read together."""

    def __init__(self, sequences: list[Sequence]):
        super().__init__()
        self.sequences = sequences


class ShardedLoader(PrefetchingLoader):
    """Batches of a StoreSource, of which this process reads the shards that it holds.

    held: [(rows int array, columns slice)] of the permuted batch [B, T], as JAX's sharding assigns them to
    the devices of this process; by default the whole batch. Every process plans every sequence (a few numbers
    per document) and reads its own shards, so all go through the same global batches with the same state.
    """

    def __init__(self, source: Source, batch_size: int, seq_len: int, layout: str = 'zigzag',
                 ring_size: int = 1, vocab_size: int | None = None,
                 held: Iterable[tuple[np.ndarray, slice]] | None = None):
        super().__init__(source, batch_size)
        self._seq_len = seq_len
        self._vocab_size = source.tokenizer.vocab_size if vocab_size is None else vocab_size
        slices = defaultdict(set)
        for rows, columns in [(np.arange(batch_size), slice(None))] if held is None else held:
            for row in rows.reshape(-1).tolist():
                slices[row].add(columns.indices(seq_len)[:2])
        permuted = permutation(layout, seq_len, ring_size)
        plans = {one: read_plan(permuted, one) for one in {frozenset(one) for one in slices.values()}}
        self._read_plans = {row: plans[frozenset(one)] for row, one in slices.items()}

    def counts(self, batch: ShardedBatch, window: int | None = None) -> tuple[int, int]:
        """(tokens, query-key pairs under the causal mask, each with at most window keys), whole batch."""
        tokens, pairs = zip(*(sequence.counts(window) for sequence in batch.sequences), strict=True)
        return sum(tokens), sum(pairs)

    def _make(self) -> tuple[ShardedBatch, dict[str, Any]]:
        sequences = [self._source.next_sequence(self._seq_len) for _ in range(self._batch_size)]
        batch = ShardedBatch(sequences)
        for row, plan in self._read_plans.items():
            arrays = read(sequences[row], self._source.documents, plan.runs)
            self._check(arrays, sequences[row], plan.runs)
            for name, values in arrays.items():
                shards = batch.setdefault(name, ShardedArray(values.dtype, self._seq_len))
                for (start, stop), indices in plan.indices.items():
                    shards.add(row, start, stop, values[indices])
        return batch, self._source.state

    def _check(self, arrays: dict[str, np.ndarray], sequence: Sequence, runs: list[Run]) -> None:
        """Refuse ids outside the vocabulary: a device would silently clamp a wrong id."""
        for name, later in (('tokens', 0), ('targets', 1)):
            ids = arrays[name]
            if ids.min() < 0 or ids.max() >= self._vocab_size:
                at = int(np.argmax((ids < 0) | (ids >= self._vocab_size)))
                column = np.concatenate([np.arange(*run) for run in runs])[at] + later
                raise ValueError(f'{self._place(sequence, int(column))} has id {ids[at]}, which is not in '
                                 f"0..{self._vocab_size - 1}; tokenize the corpus with the tokenizer of the "
                                 "model's checkpoint")

    def _place(self, sequence: Sequence, column: int) -> str:
        """Which token of which document is in a column of a sequence, or follows it."""
        ends = np.cumsum(sequence.stop - sequence.start)
        p = min(int(np.searchsorted(ends, column, 'right')), len(ends) - 1)
        token = int(sequence.stop[p]) - int(ends[p]) + column
        if sequence.document[p] < 0:
            return f'token {token} of a synthetic sequence'
        return f'token {token} of {self._source.documents.describe(int(sequence.document[p]))} (with its bos)'
