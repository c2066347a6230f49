"""Progress of a run: lines on the terminal, TensorBoard scalars, a JSONL record of every step."""

import collections
import contextlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from lct import files, processes
from lct.models.flops import train_flops, visible_pairs
from lct.models.llama import LlamaConfig
from lct.models.lora import Adapter
from lct.terminal import write_line
from lct.train import event_records
from lct.train.metrics_writer import MetricsWriter, grouped
from lct.train.stages import Stage
from lct.train.trackers import Tracker

GIB = 1 << 30


def whole_row_flops(config: LlamaConfig, stage: Stage, adapter: Adapter | None = None) -> float:
    """train_flops of one step of a stage if every row is one document; compares the cost of stages."""
    rows = stage.batch_size * stage.accumulation
    pairs = rows * visible_pairs(stage.seq_len, config.window)
    return train_flops(config, rows * stage.seq_len, pairs, adapter)


def measured_peak(dtype: jnp.dtype) -> float:
    """Measured FLOP/s of a large matmul on all devices, the reference for utilization."""
    size = 1024 if jax.default_backend() == 'cpu' else 8192
    x = jnp.ones((size, size), dtype)
    multiply = jax.jit(jnp.dot)
    multiply(x, x).block_until_ready()
    best = min(_seconds(lambda: multiply(x, x).block_until_ready()) for _ in range(3))
    # virtual CPU devices share the same cores: one matmul already uses them all
    devices = 1 if jax.default_backend() == 'cpu' else jax.device_count()
    return 2 * size**3 / best * devices


def _seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def memory_in_use() -> dict[str, float]:
    """GiB of memory: of this process on the host, and of its fullest device, now and its peak (CPUs do not
    count theirs)."""
    stats = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
    found = {f'device_memory_{name}gib': max(one[field] for one in stats) / GIB
             for name, field in (('', 'bytes_in_use'), ('peak_', 'peak_bytes_in_use'))
             if stats and all(field in one for one in stats)}
    with contextlib.suppress(OSError, ValueError, IndexError):
        pages = int(Path('/proc/self/statm').read_text().split()[1])
        found['host_memory_gib'] = pages * os.sysconf('SC_PAGE_SIZE') / GIB
    return found


class Pace:
    """Speed over the last WINDOW steps, saves included, from the times at which they ended. The first step,
    which includes the compilation, only starts the clock."""

    WINDOW = 20

    def __init__(self):
        self._ended = collections.deque(maxlen=self.WINDOW + 1)

    def ended(self, flops: float, now: float) -> tuple[float, float] | None:
        """Add a step of so many FLOPs that ended at time now (seconds). Returns (seconds per step, FLOP/s),
        or None after the first step."""
        self._ended.append((now, flops))
        steps = len(self._ended) - 1
        elapsed = now - self._ended[0][0]
        if not steps or not elapsed:
            return None
        return elapsed / steps, sum(flops for _, flops in list(self._ended)[1:]) / elapsed


class Metrics:
    """Writes metrics.jsonl and TensorBoard events under a folder, and progress lines on stdout. In a run of
    several processes only the first writes. Nothing here raises or waits for a disk, see MetricsWriter.

    metrics.jsonl has one JSON object for every step; a number that is not finite is null.
    """

    def __init__(self, folder: str | Path, first_step: int, line_every_s: float = 3.0,
                 trackers: Sequence[Tracker] = ()):
        folder, self._trackers = Path(folder), trackers
        self._every, self._last_line, self._writer = line_every_s, -float('inf'), None
        if not processes.is_first():
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _drop_rows_after(folder / 'metrics.jsonl', first_step)
        except OSError as error:
            log(f'WARNING: {error.filename} cannot be written ({error.strerror}); training goes on')
        self._writer = MetricsWriter(folder, first_step + 1, log)

    def write(self, step: int, values: Mapping[str, float | str]) -> None:
        """Record the scalars of one step. 'stage' may be the name of its stage."""
        if self._writer:
            self._writer.add(step, values)
        for tracker in self._trackers:
            tracker.scalars(step, grouped(values))

    def progress(self, text: str, force: bool = False) -> None:
        """Print a progress line; without force at most one in line_every_s seconds."""
        now = time.monotonic()
        if force or now - self._last_line >= self._every:
            self._last_line = now
            log(text)

    def flush(self) -> None:
        """Hand all rows to the operating system: rows before a checkpoint must survive a kill after it."""
        if self._writer:
            self._writer.flush()

    def close(self) -> None:
        if self._writer:
            self._writer.close()


def write_images(folder: str | Path, step: int, pictures: Mapping[str, Path],
                 trackers: Sequence[Tracker] = ()) -> None:
    """Show PNG files in TensorBoard and in trackers, {name: path}; those of an earlier call are replaced.

    They are a run of their own, folder/evaluation: an event file hides what earlier ones of its folder have
    from its first step on.
    """
    if not pictures:
        return
    folder = Path(folder) / 'evaluation'
    folder.mkdir(parents=True, exist_ok=True)
    records = [event_records.image(step, name, path.read_bytes()) for name, path in pictures.items()]
    for old in folder.glob(event_records.PREFIX + '*'):
        old.unlink()
    files.write_atomically(event_records.new_path(folder), b''.join((event_records.header(0), *records)))
    for tracker in trackers:
        for name, path in pictures.items():
            tracker.image(step, name, path)


def _drop_rows_after(path, step):
    """Drop what a killed run wrote beyond its last checkpoint, and lines that are cut short or damaged."""
    if not path.is_file():
        return
    content = path.read_bytes()
    kept = b''.join(row + b'\n' for row in content.splitlines() if _step_of(row) <= step)
    if content.startswith(kept):
        os.truncate(path, len(kept))  # also on a full disk
    else:
        files.write_atomically(path, kept)


def _step_of(row):
    try:
        return json.loads(row)['step']
    except (ValueError, KeyError, TypeError):
        return 1 << 62


def log(text: str) -> None:
    """One line on stdout from the first process only, visible at once."""
    if processes.is_first():
        write_line(text)
