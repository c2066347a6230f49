"""What watches a training run without changing it."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from lct.train.step_profile import StepProfile
from lct.train.trackers import Tracker


class Observers(NamedTuple):
    """Observers of a run.

    profile: traces a few steps. trackers: copies of the metrics elsewhere; whoever opened them closes them.
    after_stage: callable (Stage, LlamaConfig, Params), called on the stage's mesh after every stage but the
      last, and again by a call that continues from there.
    """

    profile: StepProfile = StepProfile()
    trackers: Sequence[Tracker] = ()
    after_stage: Callable | None = None
