"""Batches of host numpy arrays in the order of a layout, made ahead of time by a thread."""

import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

from lct.data.layout import permutation, permute
from lct.data.tokenizer import Tokenizer
from lct.terminal import write_line


class Source(Protocol):
    """A MemorySource or a StoreSource. state: a small JSON dict, from which the stream continues."""
    tokenizer: Tokenizer
    state: dict[str, Any]

    def describe(self, state: dict[str, Any], count: int, seq_len: int) -> list[dict[str, Any]]:
        """The `count` rows of seq_len tokens after a state, as PrefetchingLoader.describe gives them."""


class StopRequested(Exception):
    """The run is to stop, and there is no batch yet."""


class PrefetchingLoader:
    """Batches of a source, each with the source's state after it. Subclasses define _make and _seq_len.

    A single thread makes up to two batches ahead, in order. While it runs the source belongs to it. close()
    returns the source in its state after the batch that next() returned last, so that the next stage can
    continue from it. An OSError of the source is tried again after the seconds of RETRY_S: file servers
    restart. No call waits for longer than LIMIT_S.

    waited_s: seconds that next() has waited so far. stop_requested: not empty once nobody should wait any
    longer. warn: takes a line about data that cannot be read, in the thread.
    """
    PREFETCH = 2
    RETRY_S = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
    POLL_S, LIMIT_S, ABANDON_S = 0.2, 7200.0, 5.0

    def __init__(self, source: Source, batch_size: int):
        if batch_size < 1:
            raise ValueError(f'batch_size {batch_size} must be at least 1')
        self.waited_s = 0.0
        self._source, self._batch_size = source, batch_size
        self._delivered = source.state
        self.stop_requested: Sequence = ()
        self.warn: Callable[[str], object] = lambda text: write_line(text, sys.stderr)
        self._ahead, self._error = None, None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.close()

    def next(self) -> tuple[Mapping, dict[str, Any]]:
        """(batch, state): restore(state) continues after this batch.

        Raises:
          StopRequested: if there is no batch yet and the run is to stop.
          OSError: if the data cannot be read, also after the last of RETRY_S, or do not come within LIMIT_S.
        """
        if self._error is not None:
            raise self._error
        if self._ahead is None:
            self._ahead = _Ahead(self._make_or_retry, self.PREFETCH)
        start = time.perf_counter()
        try:
            batch, state = self._wait(start)
        except StopRequested:
            raise
        except Exception as error:
            # A later call must not continue as if the bad batch did not exist.
            self._error = error
            self.close()
            raise
        self.waited_s += time.perf_counter() - start
        self._delivered = state
        return batch, dict(state)

    def _wait(self, start):
        while True:
            made = self._ahead.get(self.POLL_S)
            if made is not None:
                return made
            if self.stop_requested:
                raise StopRequested
            if time.perf_counter() - start > self.LIMIT_S:
                raise TimeoutError(f'the data gave no batch in {self.LIMIT_S:.0f} s; check their file system')

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
        if self._ahead is None:
            return
        self._ahead.stop()
        start = time.perf_counter()
        while not self._ahead.ended(self.POLL_S):
            waited = time.perf_counter() - start
            if waited > (self.ABANDON_S if self.stop_requested else self.LIMIT_S):
                break  # the run ends, and the thread with it
        self._ahead = None
        self._source.state = self._delivered

    def _make_or_retry(self, stopped: threading.Event) -> tuple[Mapping, dict[str, Any]]:
        """_make, again after every OSError until there are too many of them."""
        before = self._source.state
        for number, pause in enumerate((*self.RETRY_S, None)):
            try:
                return self._make()
            except OSError as error:
                reason = ' '.join(str(error).split())
                if pause is None:
                    raise OSError(
                        f'the data cannot be read ({reason}), also after {sum(self.RETRY_S):.0f} s; the same '
                        'command continues once they can') from error
                if not number:
                    self.warn(f'WARNING: the data cannot be read ({reason}); trying again for '
                              f'{sum(self.RETRY_S):.0f} s')
                if stopped.wait(pause):
                    raise
                self._source.state = before

    def _make(self) -> tuple[Mapping, dict[str, Any]]:
        """(the next batch of the source, the source's state after it)."""
        raise NotImplementedError


class _Ahead:
    """A thread that makes results, in order, at most `count` of them before they are taken.

    A daemon: one that hangs in a read must not keep the process alive.
    """

    def __init__(self, make: Callable[[threading.Event], tuple], count: int):
        self._results, self._stopped = queue.Queue(count - 1), threading.Event()
        self._thread = threading.Thread(target=self._run, args=(make,), name='lct-loader', daemon=True)
        self._thread.start()

    def _run(self, make: Callable[[threading.Event], tuple]) -> None:
        error = None
        while error is None and not self._stopped.is_set():
            result = None
            try:
                result = make(self._stopped)
            except BaseException as raised:
                error = raised
            self._results.put((result, error))

    def get(self, seconds: float) -> tuple | None:
        """The next result, or None if there is none within so many seconds. Raises what make raised."""
        try:
            result, error = self._results.get(timeout=seconds)
        except queue.Empty:
            return None
        if error is not None:
            raise error
        return result

    def stop(self) -> None:
        """Make no further result. Those not taken are discarded, so that the thread has room for its last."""
        self._stopped.set()
        while not self._results.empty():
            self._results.get_nowait()

    def ended(self, seconds: float) -> bool:
        """Whether the thread has ended, or does so within so many seconds."""
        self._thread.join(seconds)
        return not self._thread.is_alive()


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
