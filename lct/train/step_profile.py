"""A trace of a few training steps, for XProf, TensorBoard's profile tab and Perfetto."""

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

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
    optimizer, and within attention that of the strategy. Nothing here raises: a trace ends no training.
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

    def _guarded(self, function, verb):
        try:
            function()
        except (RuntimeError, ValueError, OSError) as error:
            self._log(f'WARNING: the profile could not {verb} ({" ".join(str(error).split())[:200]})')
