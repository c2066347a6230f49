"""A script of experiments/ run by a study, as a process of its own."""

import subprocess
import sys

from lct import exit_status
from lct.cli.paths import experiments_folder


def call(script: str, *flags: object) -> None:
    """Run a script to its end.

    Raises:
      KeyboardInterrupt: if it was stopped, so that the study stops too.
      ValueError: if it failed.
    """
    command = [sys.executable, experiments_folder() / script, *flags]
    done = subprocess.run(list(map(str, command)), check=False)
    if done.returncode == exit_status.STOPPED:
        raise KeyboardInterrupt
    if done.returncode:
        raise ValueError(f'{script} ended with status {done.returncode}; its last line says why, and the '
                         'same command continues')
