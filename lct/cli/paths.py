"""Paths of files that are part of a checkout but not of an installed package."""

import sys
from pathlib import Path


def experiments_folder() -> Path:
    """experiments/ of the checkout that contains the running script, the working directory or this file.

    Raises:
      ValueError: if none of them is in a checkout.
    """
    starts = Path(sys.argv[0]).resolve(), Path.cwd() / 'script', Path(__file__).resolve()
    for start in starts:
        for parent in start.parents:
            if (parent / 'experiments' / 'base' / 'config.json').is_file():
                return parent / 'experiments'
    raise ValueError(f'experiments/ of the lct checkout is neither above {starts[0]} nor above {Path.cwd()}; '
                     'run the script from a clone of the repository')
