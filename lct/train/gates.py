"""Gates: a stage ends when the model recalls at its length and reads short text as well as the base model.

The Llama-3 report (Llama Team 2024, arXiv 2407.21783, section 3.4.2) advances to the next length by these two
scores. The evaluation that gives them is a function argument of the loop. This module holds the rule, and the
log of scores that makes a run decide the same when it is stopped and continued.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lct import files, processes

SCORES = ('needle', 'short_loss_rise')


@dataclasses.dataclass(frozen=True)
class Gate:
    """The scores at which a stage may end before its num_steps, and what to do if it never reaches them.

    every: steps between two evaluations.
    needle: smallest share of recall-probe prompts answered correctly at the stage's length.
    short_loss_rise: largest rise of the loss over the base model's, within its length, in nats per token.
    otherwise: 'stop' the run, or 'advance' to the next stage, if the gate is closed after num_steps.
    """

    every: int
    needle: float = 0.9
    short_loss_rise: float = 0.05
    otherwise: str = 'stop'

    def __post_init__(self):
        if type(self.every) is not int or self.every < 1:
            raise ValueError(
                f'gate every {self.every!r} must be a positive number of steps between evaluations')
        if not 0 <= self.needle <= 1:
            raise ValueError(f'gate needle {self.needle!r} is a share of prompts and must lie in 0..1')
        if self.otherwise not in ('stop', 'advance'):
            raise ValueError(f"gate otherwise {self.otherwise!r} must be 'stop' or 'advance'")

    def due(self, steps: int) -> bool:
        """Whether to evaluate after this many steps of the stage."""
        return steps > 0 and steps % self.every == 0

    def opens(self, scores: Mapping[str, float]) -> bool:
        """Whether scores pass both thresholds; a NaN passes none."""
        return scores['needle'] >= self.needle and scores['short_loss_rise'] <= self.short_loss_rise

    def describe(self, scores: Mapping[str, float]) -> str:
        """Scores beside their thresholds, in one line."""
        return (f'recall probe {scores["needle"]:.2f} (at least {self.needle:.2f}), short-context loss '
                f'{scores["short_loss_rise"]:+.3f} over the base model (at most {self.short_loss_rise:+.3f})')


class GateClosed(ValueError):
    """The gate of a stage did not open within its steps, and its config says to stop then."""


def closed_message(stage: Any, scores: Mapping[str, float]) -> str:
    """The message of GateClosed for a stages.Stage."""
    return (f'stage {stage.name}: the gate is closed after all {stage.num_steps} steps: '
            f"{stage.gate.describe(scores)}; the steps are saved: continue with other thresholds or "
            "otherwise 'advance' for this gate, or with more num_steps")


class GateLog:
    """The scores at every evaluation of a gate: a JSON list of {stage, step, steps, needle, short_loss_rise}.

    step: of the schedule. steps: trained within the stage so far. The file holds measurements, not decisions:
    a run that is killed and continued decides the same without evaluating again, and one whose thresholds
    were changed decides by the new ones.
    """

    def __init__(self, path: str | Path):
        self._path = Path(path)
        rows = json.loads(self._path.read_text()) if self._path.exists() else []
        self._rows = {(row['stage'], row['step']): row for row in rows}

    def at(self, stage: str, step: int) -> dict | None:
        """The row of a stage at a step of the schedule, or None."""
        return self._rows.get((stage, step))

    def add(self, stage: str, step: int, steps: int, scores: Mapping[str, float]) -> dict:
        """Record scores; returns their row."""
        row = {'stage': stage, 'step': step, 'steps': steps, **{name: float(scores[name]) for name in SCORES}}
        self._rows[stage, step] = row
        if processes.is_first():
            files.write_atomically(self._path, json.dumps(list(self._rows.values()), indent=1))
        return row
