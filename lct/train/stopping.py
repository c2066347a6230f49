"""Signals as requests to stop: all processes finish the step in hand and save."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from lct import processes, stop_signals, watchdog
from lct.terminal import write_now
from lct.train.checkpoint import Checkpoints


class Interrupted(Exception):
    """The run has stopped on request; the message says what is saved and how to continue."""


@contextlib.contextmanager
def catch_signals() -> Iterator[list[str]]:
    """Yield a list that gets the name of the first SIGINT, SIGTERM, SIGUSR1 or SIGHUP; a second signal ends
    the process at once, see stop_signals.

    Outside the main thread, where Python takes no handlers, the list stays empty.
    """
    stop_requested = []

    def request(name):
        stop_requested.append(name)
        phase = watchdog.current()
        if phase is not None and phase.name in ('set_up', 'evaluation'):
            promise = f'stopping; in phase {phase} there is nothing to save'
        else:
            promise = 'stopping after this step and saving'
        write_now(f'{name}: {promise} (once more to stop at once)\n')

    with stop_signals.catch(request):
        yield stop_requested


def check_stop(stop_requested: Sequence[str]) -> None:
    """For work outside training steps, where nothing is left to save. All processes must call this together.

    Raises:
      Interrupted: if any process was requested to stop.
    """
    watchdog.beat()
    if processes.anyone(stop_requested):
        reason = stop_requested[0] if stop_requested else 'a signal to another process'
        raise Interrupted(f'{reason}: stopped; what is finished is kept, run the same command to continue')


def stop_message(checkpoints: Checkpoints, step: int, last_step: int, reason: str = '') -> str:
    """The message of a run that stops after step. Waits for its checkpoints and reports what is on disk.

    reason: why the step was not saved, if it was not and no error says so.
    """
    problem = checkpoints.wait() or reason
    saved = checkpoints.latest() or 0
    if not step:
        return f'stopped before the first step of {last_step}; run the same command to start again'
    if saved == step:
        return (f'saved step {step} of {last_step} under {checkpoints.folder}; '
                'run the same command to continue')
    reason = f' ({problem})' if problem else ''
    start = f'after step {saved}' if saved else 'from the start'
    return f'stopped after step {step} of {last_step}, not saved{reason}; the same command continues {start}'


def loss_message(folder: str | Path) -> str:
    """What is saved in a folder of checkpoints, for the line about a lost process; waits for nothing."""
    folder = Path(folder) if isinstance(folder, str) else folder
    steps = [int(path.name) for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
    if not steps:
        return 'no checkpoint is complete yet; the same command starts again'
    return f'checkpoints up to step {max(steps)} are complete, and the same command continues from there'
