"""Fault drills: a numbered fault, and the check of what a run does about it.

A drill is a function of a fresh folder. It causes the fault and returns in a few words what happened, or
raises Failed. drills.py runs them; the modules named drill_*.py hold them.
"""

import hashlib
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

CHECKS = pathlib.Path(__file__).parent
TRAINING = CHECKS / 'drill_training.py'


class Failed(Exception):
    """What happened in place of what should have."""


class NotHere(Exception):
    """What a drill needs that this machine does not have."""


class Drill(NamedTuple):
    number: int
    fault: str
    function: Callable[[pathlib.Path], str]


DRILLS: list[Drill] = []


def drill(number: int, fault: str) -> Callable:
    """Register a function (folder) -> what happened; several drills may share a number."""
    def register(function):
        DRILLS.append(Drill(number, fault, function))
        return function
    return register


def expect(condition: object, happened: str) -> None:
    """Raise Failed with what happened unless the condition holds."""
    if not condition:
        raise Failed(happened)


class Ended(NamedTuple):
    """An ended process: its status (a signal as a negative number), output lines and seconds."""

    status: int
    stdout: list[str]
    stderr: list[str]
    seconds: float

    @property
    def weights(self) -> str:
        """The hash of the final weights that drill_training.py printed, or ''."""
        lines = [line for line in self.stdout if line.startswith('weights ')]
        return lines[-1].split()[1] if lines else ''


def start(arguments: Sequence[object], environment: Mapping[str, str] | None = None) -> subprocess.Popen:
    """Start a Python script with arguments; pass its Popen to finish."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        errors='replace', env={**os.environ, 'PYTHONUNBUFFERED': '1', **(environment or {})})


def finish(process: subprocess.Popen, limit_s: float = 300) -> Ended:
    """Wait for a process. One that outlasts limit_s is killed and fails the drill."""
    began = time.monotonic()
    try:
        stdout, stderr = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired as error:
        process.kill()
        process.communicate(timeout=60)
        raise Failed(f'still running after {limit_s:.0f} s') from error
    return Ended(process.returncode, stdout.splitlines(), stderr.splitlines(), time.monotonic() - began)


def training(workdir: pathlib.Path, *arguments: object, limit_s: float = 300, **environment: str) -> Ended:
    """Run drill_training.py to its end."""
    return finish(start([TRAINING, workdir, *arguments], environment), limit_s)


def files_of(folder: pathlib.Path) -> list[pathlib.Path]:
    """All files below folder, sorted."""
    return sorted(path for path in folder.rglob('*') if path.is_file())


def flip_bit(path: pathlib.Path, bit: int) -> None:
    """Flip one bit of a file in place."""
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(content)


def sha256(path: pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
