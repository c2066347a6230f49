"""Lines on stdout and stderr that can neither end nor block a run: terminals close, disks and pipes fill."""

import contextlib
import errno
import os
import select
import sys
from typing import TextIO

CLOSED = (errno.EIO, errno.EPIPE, errno.EBADF)  # a closed terminal, a reader that has ended


def write_line(text: str, stream: TextIO | None = None) -> None:
    """Print a line, by default on stdout, visible at once. If the stream is closed, this and all that follows
    is discarded."""
    stream = stream or sys.stdout
    try:
        print(text, file=stream, flush=True)
    except (OSError, ValueError) as error:
        if getattr(error, 'errno', None) in CLOSED:
            _discard(stream)


def write_now(text: str) -> None:
    """Write to stderr, unless that would block: for signal handlers and threads that may not wait.

    Not print: the main thread may be in the middle of one, and a buffered stream cannot be re-entered.
    """
    with contextlib.suppress(OSError):
        if select.select((), (2,), (), 0)[1]:
            os.write(2, text.encode())


def flush() -> None:
    """Flush stdout and stderr, or discard what they cannot take: at its end Python would fail for it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            _discard(stream)


def _discard(stream: TextIO) -> None:
    """Connect a stream to nothing."""
    with contextlib.suppress(OSError, ValueError):
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, stream.fileno())
        os.close(nothing)
        stream.flush()
