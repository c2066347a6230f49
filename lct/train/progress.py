"""The metrics and progress lines of one stage."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from lct.models import lora
from lct.text import clock
from lct.train.bad_steps import NO_TARGET, SPIKE, BadSteps, reason_of
from lct.train.metrics import Metrics, Pace, memory_in_use, whole_row_flops
from lct.train.stages import PlannedStage


class Work(NamedTuple):
    """What a step cost. flops: of the model. tokens: of the run so far, this step and padding included."""

    flops: float
    tokens: int


class StageProgress:
    """Writes the metrics of a stage's steps and the rows of bad ones, and ends the run after too many skips.

    The metrics of a step are read one step late, so that the devices never wait for the host.
    """

    def __init__(self, planned: PlannedStage, later: Sequence[PlannedStage], metrics: Metrics, peak: float,
                 max_skips_in_row: int, bad_steps: BadSteps, adapter: lora.Adapter | None = None):
        """later: the stages after this one. peak: FLOP/s, the reference for utilization."""
        self._stage, self._end = planned.stage, planned.end
        self._last = later[-1].end if later else planned.end
        self._metrics, self._peak, self._max_skips = metrics, peak, max_skips_in_row
        self._bad_steps, self._reasons = bad_steps, set()  # reasons of the present row of skips
        self._pace, self._start, self._pending = Pace(), time.monotonic(), None
        self._step_began = self._start
        # the later stages in steps of this one; before they run, their model FLOPs are the best estimate
        flops = lambda stage: whole_row_flops(planned.config, stage, adapter)
        cost = sum(after.stage.num_steps * flops(after.stage) for after in later)
        self._later_steps = cost / flops(planned.stage)

    def add(self, device_metrics: dict[str, jax.Array], step: int, work: Work,
            rows: Callable[[], list[dict[str, Any]]]) -> None:
        """Take the metrics of a step that may still be running, and write those of the step before.

        rows: describes the rows of the step's batch; called only if it is a bad one.

        Raises:
          FloatingPointError: after max_skips_in_row skipped steps in a row; flush raises it too.
        """
        pending, self._pending = self._pending, (device_metrics, step, work, rows)
        if pending:
            self.write(*pending)

    def flush(self) -> None:
        """Write the metrics of the newest step, and hand all rows to the operating system."""
        pending, self._pending = self._pending, None
        if pending:
            self.write(*pending)
        self._metrics.flush()

    def write(self, device_metrics: dict[str, jax.Array], step: int, work: Work,
              rows: Callable[[], list[dict[str, Any]]]) -> None:
        """Write the metrics of one step; waits until it is computed."""
        values = {name: x.item() for name, x in jax.device_get(device_metrics).items()}
        values |= {'stage': self._stage.name, 'seq_len': self._stage.seq_len, 'tokens_seen': work.tokens}
        now = time.monotonic()
        pace, step_s = self._pace.ended(work.flops, now), now - self._step_began
        self._step_began = now
        if pace:
            per_step, flops_per_second = pace
            values['tokens_per_second'] = self._stage.tokens_per_step / per_step
            values['matmul_peak_fraction'] = flops_per_second / self._peak
            values['step_seconds'] = step_s
            speed = self._describe(values, per_step, step)
        else:
            speed = f'first step after {clock(now - self._start)}, compilation included'
        self._metrics.write(step, values | memory_in_use())
        reason = reason_of(values)
        if reason:
            self._bad_steps.add(step, reason, values, rows())
        note = '' if not reason else f' | {reason}, weights unchanged' if reason == NO_TARGET else (
            f' | {reason}, skipped ({values["skipped"]} so far)')
        self._metrics.progress(
            f'{self._stage.name} | step {step}/{self._last} | loss {values["loss"]:.3f} | '
            f'grad {values["grad_norm"]:.2f} | {speed}{note}',
            force=bool(reason) or not pace or step == self._end,
        )
        self._check_skips(reason, values['skipped_in_row'], step)

    def _check_skips(self, reason, skipped, step):
        """Refuse to go on after too many skipped steps in a row."""
        if not skipped:
            self._reasons.clear()
        elif reason != NO_TARGET:
            self._reasons.add(reason)
        if skipped < self._max_skips:
            return
        remedy = 'lower the learning rate or check the data there'
        if SPIKE in self._reasons:
            remedy += ', or raise spike_factor'
        raise FloatingPointError(
            f'{" or ".join(sorted(self._reasons, reverse=True))} in {skipped} steps in a row, up to step '
            f'{step}; the last checkpoint holds only finite weights, and {self._bad_steps.path} names the '
            f'rows: {remedy}')

    def _describe(self, values, seconds_per_step, step):
        text = (f'{values["tokens_per_second"]:,.0f} tok/s | {100 * values["matmul_peak_fraction"]:.0f}% of '
                f'peak | stage ends in {clock((self._end - step) * seconds_per_step)}')
        if self._later_steps:
            text += f', run in about {clock((self._end - step + self._later_steps) * seconds_per_step)}'
        return text
