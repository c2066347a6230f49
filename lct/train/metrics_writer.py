"""The thread that writes metrics, so that no disk can block or end the training."""

import contextlib
import json
import math
import queue
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from lct.train import event_records
from lct.train.append_file import AppendFile

RETRY_S = 5.0  # after a failure
WAIT_S = 10.0  # for the thread, at a checkpoint and at the end
ONCE = ('seq_len', 'tokens_seen', 'skipped', 'skipped_in_row')  # curves that a stage does not begin anew


def grouped(values: Mapping[str, float | str]) -> dict[str, float]:
    """The numbers among values, as curves: each over the whole run, and with a 'stage' again in the group of
    that stage."""
    numbers = {name: x for name, x in values.items() if isinstance(x, (int, float))}
    if stage := values.get('stage'):
        numbers |= {f'stage {stage}/{name}': x for name, x in numbers.items() if name not in ONCE}
    return numbers


class MetricsWriter:
    """Appends rows to metrics.jsonl and to a TensorBoard file in a folder.

    What cannot be written is kept and tried again. Every kind of failure is warned of once, until rows are
    written again; rows that are lost are counted. warn: takes a line.
    """

    def __init__(self, folder: Path, purge_step: int, warn: Callable[[str], object]):
        self._folder, self._warn = folder, warn
        self._rows = AppendFile(folder / 'metrics.jsonl')
        self._events = AppendFile(event_records.new_path(folder), event_records.header(purge_step))
        self._queue, self._missed = queue.Queue(AppendFile.MOST), 0
        self._failures, self._retry_at, self._silent = set(), 0.0, False
        self._thread = threading.Thread(target=self._run, name='lct-metrics', daemon=True)
        self._thread.start()

    def add(self, step: int, values: Mapping[str, float | str]) -> None:
        """Take the scalars of one step."""
        try:
            self._queue.put_nowait((step, values))
        except queue.Full:
            self._missed += 1

    def flush(self) -> None:
        """Return when all rows are handed to the operating system, or cannot be, or after WAIT_S."""
        done = threading.Event()
        try:
            self._queue.put_nowait(done)
        except queue.Full:
            return
        if done.wait(0 if self._silent else WAIT_S):
            self._silent = False
        elif not self._silent:
            self._silent = True  # from now on without a wait
            self._warn(f'WARNING: {self._folder} has taken no metrics for {WAIT_S:.0f} s; training goes on')

    def close(self) -> None:
        """Write what is left, in at most WAIT_S."""
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(None)
        self._thread.join(0 if self._silent else WAIT_S)
        missing = self._missed + self._rows.missed + self._rows.waiting + self._queue.qsize()
        if missing:
            self._warn(f'WARNING: {missing} rows of metrics could not be written to {self._rows.path}')

    def _run(self):
        while True:
            try:
                item = self._queue.get(timeout=RETRY_S if self._failures else None)
            except queue.Empty:
                item = ()
            must = not isinstance(item, tuple)
            if item and not must:
                try:
                    self._encode(*item)
                except (TypeError, ValueError, OverflowError):  # not a scalar
                    self._missed += 1
            if must or (self._queue.empty() and time.monotonic() >= self._retry_at):
                self._write()
            if item is None:
                self._rows.close()
                self._events.close()
                return
            if must:
                item.set()

    def _encode(self, step, values):
        strict = {name: None if isinstance(x, float) and not math.isfinite(x) else x
                  for name, x in values.items()}
        self._rows.add(json.dumps({'step': step, **strict}, allow_nan=False).encode() + b'\n')
        self._events.add(event_records.scalars(step, grouped(values)))

    def _write(self):
        failed = False
        for file in (self._rows, self._events):
            try:
                file.write()
            except OSError as error:
                failed = True
                if error.errno not in self._failures:
                    self._failures.add(error.errno)
                    self._warn(f'WARNING: {file.path} cannot be written ({error.strerror}); training goes '
                               f'on, and up to {file.MOST:,} rows of metrics are kept until it can')
        if failed:
            self._retry_at = time.monotonic() + RETRY_S
        elif self._failures:
            missed = self._missed + self._rows.missed
            self._failures.clear()
            self._warn(f'metrics are written again; {missed} rows are missing')
