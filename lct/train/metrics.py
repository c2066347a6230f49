"""What a run tells while it goes: a line on the terminal, TensorBoard scalars, a JSONL record."""

import json
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import tensorboardX

from lct.models import llama


def matmul_params(config):
    """Parameters that take part in a matmul per token: all but the norms and an untied embedding."""
    norms = config.embed_dim * (2 * config.num_layers + 1)
    lookup = 0 if config.tie_embeddings else config.vocab_size * config.embed_dim
    return llama.num_params(config) - norms - lookup


def step_flops(config, batch):
    """Model FLOPs of one training step: 6 per matmul parameter and token, and 12 * L * N * H for every
    query-key pair that is visible (PaLM, appendix B, counted on the packed documents themselves)."""
    tokens = int((batch['segment_ids'] > 0).sum())
    pairs = int((batch['positions'].astype(np.int64) + 1)[batch['segment_ids'] > 0].sum())
    attention = 12 * config.num_layers * config.num_heads * config.head_dim
    return 6 * matmul_params(config) * tokens + attention * pairs


def measured_peak(dtype):
    """FLOP/s of a large matmul on the devices of this process: what utilisation is a fraction of."""
    size = 2048 if jax.default_backend() == 'cpu' else 8192
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


def clock(seconds):
    """Seconds as 1h02m, 3m05s or 12s."""
    seconds = int(seconds)
    if seconds >= 3600:
        return f'{seconds // 3600}h{seconds % 3600 // 60:02d}m'
    return f'{seconds // 60}m{seconds % 60:02d}s' if seconds >= 60 else f'{seconds}s'


class Metrics:
    """Writes metrics.jsonl and TensorBoard events under a folder, and progress lines on stdout."""

    def __init__(self, folder, first_step, line_every_s=3.0):
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._events = tensorboardX.SummaryWriter(str(folder), purge_step=first_step + 1)
        self._path = folder / 'metrics.jsonl'
        if self._path.exists():  # drop what a killed run wrote beyond its last checkpoint
            rows = [row for row in self._path.read_text().splitlines() if _step_of(row) <= first_step]
            self._path.write_text(''.join(row + '\n' for row in rows))
        self._lines = self._path.open('a')
        self._every, self._last_line = line_every_s, 0.0

    def write(self, step, values):
        """Record scalars of one step."""
        self._lines.write(json.dumps({'step': step, **values}) + '\n')
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self._events.add_scalar(name, value, step)

    def progress(self, text, force=False):
        """A progress line, at most one in line_every_s seconds."""
        now = time.monotonic()
        if force or now - self._last_line >= self._every:
            self._last_line = now
            self._lines.flush()
            say(text)

    def close(self):
        self._lines.close()
        self._events.close()


def _step_of(row):
    try:
        return json.loads(row)['step']
    except (ValueError, KeyError):
        return 1 << 62  # a line cut short by the kill


def say(text):
    """One line on stdout from the first process only, visible at once."""
    if jax.process_index() == 0:
        print(text, flush=True)
        sys.stdout.flush()
