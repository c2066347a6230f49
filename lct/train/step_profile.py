"""A trace of a few training steps, for XProf, TensorBoard's profile tab and Perfetto."""

import contextlib
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from lct import files, processes
from lct.train import scope_times

MAX_BYTES = 1 << 29  # of a trace that is summarised, which Python reads event by event
TEXT = re.compile(r'steps=(\d+)(?:-(\d+))?')


def parse_steps(text: str) -> tuple[int, int]:
    """(first, last) of 'steps=10-12' or 'steps=10'; steps count from 1 over all stages.

    Raises:
      ValueError: for any other text.
    """
    match = TEXT.fullmatch(text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= first <= last:
        raise ValueError(f'--profile {text} is not of the form steps=10-12, from the first to the last step '
                         'to trace, counted from 1')
    return first, last


class StepProfile:
    """Traces the steps from first to last into a folder; steps that were taken before are not traced.

    The parts of a step have the names of their scopes: embedding, attention, ffn, lm_head, cross_entropy,
    optimizer, and within attention that of the strategy; scopes.txt has the time of each.
    Nothing here raises: a trace ends no training.
    """

    def __init__(self, first: int = 0, last: int = 0, folder: Path = Path('profile'),
                 log: Callable[[str], object] = print):
        """log: takes a line. By default nothing is traced."""
        self._first, self._last, self._folder, self._log = first, last, folder, log
        self._tracing = False

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around the call that starts a step."""
        if self._first <= number <= self._last and not self._tracing:
            self._guarded(self._start, 'begin')
        with jax.profiler.StepTraceAnnotation('train', step_num=number):
            yield

    def taken(self, number: int, state: Any) -> None:
        """After a step; waits for its state if it was the last one to trace."""
        if self._tracing and number >= self._last:
            self._guarded(lambda: jax.block_until_ready(state), 'wait')
            self.close()

    def close(self) -> None:
        """End a trace that still runs."""
        if self._tracing:
            self._tracing = False
            self._guarded(self._stop, 'end')

    def _start(self):
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # every Python call of a step would hide the rest
        jax.profiler.start_trace(self._folder, profiler_options=options)
        self._tracing = True

    def _stop(self):
        jax.profiler.stop_trace()
        self._log(f'wrote a trace of steps up to {self._last} to {self._folder}: xprof --logdir '
                  f'{self._folder}, or open its trace.json.gz in ui.perfetto.dev')
        if processes.is_first():
            self._guarded(self._summarise, 'be summarised')

    def _summarise(self):
        traces = self._folder.glob(f'plugins/profile/*/{socket.gethostname()}*.xplane.pb')
        newest = max(traces, key=lambda path: path.stat().st_mtime, default=None)
        if newest and newest.stat().st_size <= MAX_BYTES and (text := scope_times.describe(newest)):
            files.write_atomically(self._folder / 'scopes.txt', text + '\n')
            self._log(f'time by part of a step: {self._folder / "scopes.txt"}')

    def _guarded(self, function, verb):
        try:
            function()
        except (RuntimeError, ValueError, IndexError, OSError) as error:
            self._log(f'WARNING: the profile could not {verb} ({" ".join(str(error).split())[:200]})')
