"""The flags --profile and --track: what watches a run without changing it."""

import argparse
import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lct import processes
from lct.train import step_profile, trackers
from lct.train.metrics import log
from lct.train.observers import Observers


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--profile', metavar='steps=10-12',
                        help='trace these steps into WORKDIR/profile, for XProf, TensorBoard or Perfetto')
    parser.add_argument('--track', metavar='NAMES',
                        help=f'copy metrics and pictures to one or more of {",".join(trackers.BACKENDS)}')


def check(args: argparse.Namespace) -> None:
    """Refuse values of the two flags that could not be followed.

    Raises:
      ValueError: see parse_steps and parse_names.
    """
    if args.profile is not None:
        step_profile.parse_steps(args.profile)
    if args.track is not None:
        trackers.parse_names(args.track)


@contextlib.contextmanager
def observers(args: argparse.Namespace, workdir: Path, name: str, run_id: str,
              config: Mapping[str, Any]) -> Iterator[Observers]:
    """What the two flags ask for. Every process traces its own devices; only the first has trackers.

    name, run_id, config: of the run, for the trackers, which are closed at the end.
    """
    profile, opened = step_profile.StepProfile(), []
    if args.profile:
        profile = step_profile.StepProfile(*step_profile.parse_steps(args.profile), workdir / 'profile', log)
    if args.track and processes.is_first():
        about = trackers.About(name, run_id, workdir, config)
        opened = trackers.open_all(trackers.parse_names(args.track), about, log)
    try:
        yield Observers(profile, opened)
    finally:
        for tracker in opened:
            tracker.close()
