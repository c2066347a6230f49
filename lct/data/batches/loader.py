"""Batches of host numpy arrays in the order of a layout, made ahead of time by a thread."""

import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

from lct.data.layout import permutation, permute
from lct.data.tokenizer import Tokenizer


class Source(Protocol):
    """A MemorySource or a StoreSource. state: a small JSON dict, from which the stream continues."""
    tokenizer: Tokenizer
    state: dict[str, Any]

    def describe(self, state: dict[str, Any], count: int, seq_len: int) -> list[dict[str, Any]]:
        """The `count` rows of seq_len tokens after a state, as PrefetchingLoader.describe gives them."""


class PrefetchingLoader:
    """Batches of a source, each with the source's state after it. Subclasses define _make and _seq_len.

    A single thread makes up to two batches ahead, in order. While it runs the source belongs to it. close()
    returns the source in its state after the batch that next() returned last, so that the next stage can
    continue from it.
    waited_s: seconds that next() has waited so far.
    """
    PREFETCH = 2

    def __init__(self, source: Source, batch_size: int):
        if batch_size < 1:
            raise ValueError(f'batch_size {batch_size} must be at least 1')
        self.waited_s = 0.0
        self._source, self._batch_size = source, batch_size
        self._delivered = source.state
        self._executor, self._ahead, self._error = None, deque(), None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.close()

    def next(self) -> tuple[Mapping, dict[str, Any]]:
        """(batch, state): restore(state) continues after this batch."""
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
            # A later call must not continue as if the bad batch did not exist.
            self._error = error
            self.close()
            raise
        self.waited_s += time.perf_counter() - start
        self._ahead.append(self._executor.submit(self._make))
        self._delivered = state
        return batch, dict(state)

    def restore(self, state: dict[str, Any]) -> None:
        """Continue with the batch after the one that next() returned with this state."""
        self.close()
        self._source.state = state
        self._delivered = self._source.state
        self._error = None

    def describe(self, state: dict[str, Any]) -> list[dict[str, Any]]:
        """The rows of the batch after a state as dicts for JSON: kinds, seeds, and documents with offsets.

        They are planned again from the state, which takes as long as making the batch.
        """
        return self._source.describe(state, self._batch_size, self._seq_len)

    def close(self) -> None:
        """Stop the thread and discard the batches that were not delivered."""
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)
            self._executor = None
            self._ahead.clear()
            self._source.state = self._delivered

    def _make(self) -> tuple[Mapping, dict[str, Any]]:
        """(the next batch of the source, the source's state after it)."""
        raise NotImplementedError


class Loader(PrefetchingLoader):
    """Batches as dicts of complete [B, T] arrays (see packing), permuted by layout over ring_size devices.

    vocab_size: of the model; by default the tokenizer's.
    """

    def __init__(self, source: Source, batch_size: int, seq_len: int, layout: str = 'zigzag',
                 ring_size: int = 1, vocab_size: int | None = None):
        super().__init__(source, batch_size)
        self._seq_len = seq_len
        self._vocab_size = source.tokenizer.vocab_size if vocab_size is None else vocab_size
        self._indices = permutation(layout, seq_len, ring_size)

    def counts(self, batch: dict[str, np.ndarray], window: int | None = None) -> tuple[int, int]:
        """(tokens, query-key pairs under the causal mask, each query with at most window keys) of a batch."""
        inside = batch['segment_ids'] > 0
        keys = (batch['positions'].astype(np.int64) + 1)[inside]
        return int(inside.sum()), int((keys if window is None else np.minimum(keys, window)).sum())

    def _make(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        rows = [self._source.next_row(self._seq_len) for _ in range(self._batch_size)]
        batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        check_ids(batch['tokens'], self._vocab_size)
        check_ids(batch['targets'], self._vocab_size)
        return permute(batch, self._indices), self._source.state


def check_ids(ids: np.ndarray, vocab_size: int) -> None:
    """Refuse ids [B, T] outside 0 .. vocab_size - 1: a device would silently clamp a wrong id."""
    bad = (ids < 0) | (ids >= vocab_size)
    if bad.any():
        row, column = (int(i) for i in np.argwhere(bad)[0])
        raise ValueError(f'token id {ids[row, column]} in row {row}, column {column} is not in '
                         f"0..{vocab_size - 1}; use the tokenizer of the model's checkpoint")
