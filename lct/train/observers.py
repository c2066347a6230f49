"""What watches a training run without changing it."""

from collections.abc import Sequence
from typing import NamedTuple

from lct.train.step_profile import StepProfile
from lct.train.trackers import Tracker


class Observers(NamedTuple):
    """profile: traces a few steps. trackers: copies of the metrics elsewhere; whoever opened them closes
    them."""

    profile: StepProfile = StepProfile()
    trackers: Sequence[Tracker] = ()
