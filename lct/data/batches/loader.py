"""Batches of host numpy arrays in the order of a layout, made one step ahead by a thread."""
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from lct.data.layout import permutation, permute


class Prefetch:
    """mixture -> (batch, state) after (batch, state), as _make makes them.

    A single thread makes up to two batches ahead, in order. While it runs the mixture belongs to it; close()
    gives the mixture back at the batch that next() returned last, so that the next stage can go on from it.
    waited_s: seconds that next() has waited.
    """
    PREFETCH = 2

    def __init__(self, mixture, batch_size):
        if batch_size < 1:
            raise ValueError(f'batch_size {batch_size} must be at least 1')
        self.waited_s = 0.0
        self._mixture, self._batch_size = mixture, batch_size
        self._delivered = mixture.state
        self._executor, self._ahead, self._error = None, deque(), None

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def next(self):
        """-> (batch, state): state is a small JSON dict; restore(state) continues after this batch."""
        if self._error is not None:
            raise self._error
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix='lct-loader')
        while len(self._ahead) < self.PREFETCH:
            self._ahead.append(self._executor.submit(self._make))
        start = time.perf_counter()
        try:
            batch, state = self._ahead.popleft().result()
        except Exception as error:
            # A later call must not go on as if the bad batch had never been.
            self._error = error
            self.close()
            raise
        self.waited_s += time.perf_counter() - start
        self._ahead.append(self._executor.submit(self._make))
        self._delivered = state
        return batch, dict(state)

    def restore(self, state):
        """The next batch is the one that followed the batch which came with this state."""
        self.close()
        self._mixture.state = state
        self._delivered = self._mixture.state
        self._error = None

    def close(self):
        """Stops the thread and takes back the batches that nobody has seen."""
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)
            self._executor = None
            self._ahead.clear()
            self._mixture.state = self._delivered

    def _make(self):
        """-> (batch, the state after it)"""
        raise NotImplementedError


class Loader(Prefetch):
    """mixture -> batches: dicts of whole [B, T] arrays (see packing), permuted by layout over ring_size devices.

    vocab_size: that of the model; by default the tokenizer's.
    """

    def __init__(self, mixture, batch_size, seq_len, layout='zigzag', ring_size=1, vocab_size=None):
        super().__init__(mixture, batch_size)
        self._seq_len = seq_len
        self._vocab_size = mixture.tokenizer.vocab_size if vocab_size is None else vocab_size
        self._indices = permutation(layout, seq_len, ring_size)

    def counts(self, batch):
        """-> (tokens, query-key pairs that are visible) of a batch."""
        inside = batch['segment_ids'] > 0
        return int(inside.sum()), int((batch['positions'].astype(np.int64) + 1)[inside].sum())

    def _make(self):
        rows = [self._mixture.next_row(self._seq_len) for _ in range(self._batch_size)]
        batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        check_ids(batch['tokens'], self._vocab_size)
        check_ids(batch['targets'], self._vocab_size)
        return permute(batch, self._indices), self._mixture.state


def check_ids(ids, vocab_size):
    """Refuses ids [B, T] outside 0 .. vocab_size - 1: a device would clamp a wrong id without a word."""
    bad = (ids < 0) | (ids >= vocab_size)
    if bad.any():
        row, column = (int(i) for i in np.argwhere(bad)[0])
        raise ValueError(f'token id {ids[row, column]} in row {row}, column {column} is not in '
                         f"0..{vocab_size - 1}; use the tokenizer of the model's checkpoint")
