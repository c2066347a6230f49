"""Ctrl-C and SIGTERM as requests to stop: all processes finish the step in hand and save."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator, Sequence

from lct import processes
from lct.train.checkpoint import Checkpoints


class Interrupted(Exception):
    """The run has stopped on request; the message says what is saved and how to continue."""


@contextlib.contextmanager
def catch_signals() -> Iterator[list[str]]:
    """Yield a list that gets the name of the first SIGINT or SIGTERM; a second raises KeyboardInterrupt.

    Outside the main thread, where Python takes no handlers, the list stays empty.
    """
    stop_requested = []
    if threading.current_thread() is not threading.main_thread():
        yield stop_requested
        return

    def handle(number, _frame):
        if stop_requested:
            raise KeyboardInterrupt
        stop_requested.append(signal.Signals(number).name)
        # not print: the signal may have come in the middle of one, and a buffered stream cannot be re-entered
        with contextlib.suppress(OSError):
            text = f'{stop_requested[0]}: stopping after this step and saving (once more to stop at once)\n'
            os.write(2, text.encode())

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop_requested
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def check_stop(stop_requested: Sequence[str]) -> None:
    """For work outside training steps, where nothing is left to save. All processes must call this together.

    Raises:
      Interrupted: if any process was requested to stop.
    """
    if processes.anyone(stop_requested):
        reason = stop_requested[0] if stop_requested else 'a signal to another process'
        raise Interrupted(f'{reason}: stopped; what is finished is kept, run the same command to continue')


def stop_message(checkpoints: Checkpoints, step: int, last_step: int) -> str:
    """The message of a run that stops after step. Waits for its checkpoints and reports what is on disk."""
    problem = checkpoints.wait()
    saved = checkpoints.latest() or 0
    if not step:
        return f'stopped before the first step of {last_step}; run the same command to start again'
    if saved == step:
        return (f'saved step {step} of {last_step} under {checkpoints.folder}; '
                'run the same command to continue')
    reason = f' ({problem})' if problem else ''
    start = f'after step {saved}' if saved else 'from the start'
    return f'stopped after step {step} of {last_step}, not saved{reason}; the same command continues {start}'
