"""Keeps the stack trace with which jax aborts, when it loses process 0, off stderr: one line says it.

jax may abort in the milliseconds before the line of lct.peers is out, and has no public setting against it.
A process of its own filters stderr, because it must outlive the abort.
"""

import os
import subprocess
import sys
from collections.abc import Iterable, Iterator

POLLED = b'Polled an error from coordination service'
ABORT = b'Terminating process because the JAX distributed service detected fatal errors'
OWN = b'error: process '
REPLACEMENT = b'error: process 0 is gone, and jax ended this process; the same command continues\n'


def filter_stderr() -> None:
    """Send what this process writes to stderr, also from C++, through a filter."""
    read, write = os.pipe()
    try:
        subprocess.Popen([sys.executable, '-I', '-S', __file__], stdin=read, start_new_session=True)
        os.dup2(write, 2)
    finally:
        os.close(read)
        os.close(write)


def without_abort(lines: Iterable[bytes]) -> Iterator[bytes]:
    """The lines without jax's report of a lost process, which goes on to the end."""
    aborted = reported = False
    for line in lines:
        aborted |= ABORT in line
        reported |= line.startswith(OWN)
        if line.startswith(OWN) or not aborted and POLLED not in line:
            yield line
    if aborted and not reported:
        yield REPLACEMENT


if __name__ == '__main__':
    for passed in without_abort(sys.stdin.buffer):
        os.write(2, passed)
