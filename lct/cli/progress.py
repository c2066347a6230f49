"""Status lines on stderr: the activity of a script and its progress. Results go to stdout."""

import os
import sys
import time
from typing import IO

from lct.text import clock

INTERVAL = 30  # seconds between two lines of progress outside a terminal
BAR_WIDTH = 30  # characters


def styled(code: int, text: str, stream: IO) -> str:
    """Text in an ANSI style, where the stream is a terminal that may have one."""
    return f'\033[{code}m{text}\033[0m' if stream.isatty() and 'NO_COLOR' not in os.environ else text


def bold(text: str) -> str:
    return styled(1, text, sys.stdout)


def status(name: str, text: str, transient: bool = False) -> None:
    """Print a status line. In a terminal the next one overwrites a transient one."""
    in_terminal = sys.stderr.isatty()
    clear, end = ('\r\033[K', '' if transient else '\n') if in_terminal else ('', '\n')
    print(clear + styled(2, f'{name:8} {text}', sys.stderr), end=end, file=sys.stderr, flush=True)


class Progress:
    """A status line that is overwritten in a terminal, and printed every INTERVAL seconds elsewhere.

    unit: what is counted.
    """

    def __init__(self, name: str, unit: str = 'samples'):
        self.name, self.unit, self.start, self.last = name, unit, time.monotonic(), None

    def __call__(self, done: int, total: int, seconds_left: float | None = None) -> None:
        """seconds_left: remaining time; by default estimated from the average speed so far."""
        now, in_terminal = time.monotonic(), sys.stderr.isatty()
        if not (in_terminal or self.last is None or now - self.last > INTERVAL or done == total):
            return
        self.last = now
        if seconds_left is None and done:
            seconds_left = (now - self.start) / done * (total - done)
        bar = f"{'█' * (BAR_WIDTH * done // max(total, 1)):░<{BAR_WIDTH}} " if in_terminal else ''
        left = '' if seconds_left is None else f', {clock(seconds_left)} left'
        status(self.name, f'{bar}{done:,} of {total:,} {self.unit}{left}', transient=True)

    def end(self) -> None:
        """Keep the last line."""
        if self.last is not None and sys.stderr.isatty():
            print(file=sys.stderr)
