"""Gates: a stage ends when the model finds needles at its length and reads short text as well as before.

The Llama-3 report (Llama Team 2024, arXiv 2407.21783, section 3.4.2) advances to the next length by these two signs.
What they measure is a function argument of the loop; here is the rule, and the record that makes it hold for a run
that is stopped and continued.
"""

import dataclasses
import json
import pathlib

from lct import files, processes

SCORES = ('needle', 'short_loss_rise')


@dataclasses.dataclass(frozen=True)
class Gate:
    """When a stage may end before its num_steps, and what happens if it may not even then.

    every: steps from look to look. needle: least share of the needles found at the stage's length.
    short_loss_rise: most that the loss within the base model's length may exceed the base model's, nats a token.
    otherwise: 'stop' the run, or 'advance' all the same, when num_steps are over and the gate is still shut.
    """

    every: int
    needle: float = 0.9
    short_loss_rise: float = 0.05
    otherwise: str = 'stop'

    def __post_init__(self):
        if type(self.every) is not int or self.every < 1:
            raise ValueError(f'gate every {self.every!r} must be a positive number of steps between looks')
        if not 0 <= self.needle <= 1:
            raise ValueError(f'gate needle {self.needle!r} is a share of needles found and must lie in 0..1')
        if self.otherwise not in ('stop', 'advance'):
            raise ValueError(f"gate otherwise {self.otherwise!r} must be 'stop' or 'advance'")

    def due(self, steps):
        """Whether to look after so many steps of the stage."""
        return steps > 0 and steps % self.every == 0

    def opens(self, scores):
        """Whether scores pass both thresholds; one that is not a number does not."""
        return scores['needle'] >= self.needle and scores['short_loss_rise'] <= self.short_loss_rise

    def describe(self, scores):
        """Scores beside their thresholds, for a line."""
        return (f'needles found {scores["needle"]:.2f} (at least {self.needle:.2f}), short-context loss '
                f'{scores["short_loss_rise"]:+.3f} over the base model (at most {self.short_loss_rise:+.3f})')


class Shut(ValueError):
    """The gate of a stage did not open in all its steps, and its config says to stop then."""


def stopped(stage, scores):
    """What a run that a gate has stopped says."""
    return (f'stage {stage.name}: the gate is shut after all {stage.num_steps} steps: {stage.gate.describe(scores)}; '
            "the steps are saved: continue with other thresholds or otherwise 'advance' for this gate, or train longer "
            'in a new folder')


class Looks:
    """What the gates of a run saw: a JSON list of {stage, step, steps, needle, short_loss_rise}.

    The file holds measurements, not decisions: a run that is killed and continued decides the same without a second
    look, and one whose thresholds were changed decides by the new ones. steps: trained within the stage so far.
    """

    def __init__(self, path):
        self._path = pathlib.Path(path)
        rows = json.loads(self._path.read_text()) if self._path.exists() else []
        self._rows = {(row['stage'], row['step']): row for row in rows}

    def at(self, stage, step):
        """The row of a look at a step of the schedule, or None."""
        return self._rows.get((stage, step))

    def add(self, stage, step, steps, scores):
        """Record a look; returns its row."""
        row = {'stage': stage, 'step': step, 'steps': steps, **{name: float(scores[name]) for name in SCORES}}
        self._rows[stage, step] = row
        if processes.is_first():
            files.write_atomically(self._path, json.dumps(list(self._rows.values()), indent=1))
        return row
