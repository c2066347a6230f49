"""Sides of a comparison as processes of their own, which work when it is their turn."""

import json
import subprocess
from collections.abc import Iterable, Sequence
from typing import Any


def start(command: Sequence[str]) -> subprocess.Popen:
    """A process that prints a line of JSON for every line of its stdin."""
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def take(worker: subprocess.Popen) -> Any:
    """What the process prints in its turn."""
    worker.stdin.write('go\n')
    worker.stdin.flush()
    line = worker.stdout.readline()
    if not line:
        raise SystemExit('a side ended; its error is above')
    return json.loads(line)


def end(workers: Iterable[subprocess.Popen]) -> None:
    """Let the processes end."""
    for worker in workers:
        worker.stdin.close()
        worker.wait()
