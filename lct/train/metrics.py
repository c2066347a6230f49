"""Progress of a run: lines on the terminal, TensorBoard scalars, a JSONL record of every step."""

import collections
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import tensorboardX

from lct import files, processes
from lct.models.flops import train_flops, visible_pairs
from lct.models.llama import LlamaConfig
from lct.models.lora import Adapter
from lct.terminal import write_line
from lct.train.stages import Stage


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
    several processes only the first writes."""

    def __init__(self, folder: str | Path, first_step: int, line_every_s: float = 3.0):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        first = processes.is_first()
        self._events = tensorboardX.SummaryWriter(str(folder), purge_step=first_step + 1, write_to_disk=first)
        self._path = folder / 'metrics.jsonl' if first else Path(os.devnull)
        if self._path.is_file():  # drop what a killed run wrote beyond its last checkpoint
            rows = [row for row in self._path.read_text().splitlines() if _step_of(row) <= first_step]
            files.write_atomically(self._path, ''.join(row + '\n' for row in rows))
        self._lines = self._path.open('a')
        self._every, self._last_line = line_every_s, -float('inf')

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record the scalars of one step."""
        self._lines.write(json.dumps({'step': step, **values}) + '\n')
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self._events.add_scalar(name, value, step)

    def progress(self, text: str, force: bool = False) -> None:
        """Print a progress line; without force at most one in line_every_s seconds."""
        now = time.monotonic()
        if force or now - self._last_line >= self._every:
            self._last_line = now
            self._lines.flush()
            log(text)

    def flush(self) -> None:
        """Hand all rows to the operating system: rows before a checkpoint must survive a kill after it."""
        self._lines.flush()
        self._events.flush()

    def close(self) -> None:
        self._lines.close()
        self._events.close()


def _step_of(row):
    try:
        return json.loads(row)['step']
    except (ValueError, KeyError):
        return 1 << 62  # a line cut short by the kill


def log(text: str) -> None:
    """One line on stdout from the first process only, visible at once."""
    if processes.is_first():
        write_line(text)
