"""Where the files that a checkout has and an installed package has not lie."""

import pathlib
import sys


def experiments_folder() -> pathlib.Path:
    """experiments/ of the checkout that the running script, the working directory or this file lies in.

    Raises:
      ValueError: if there is no checkout around any of them.
    """
    starts = (pathlib.Path(sys.argv[0]).resolve(), pathlib.Path.cwd() / 'script', pathlib.Path(__file__).resolve())
    for start in starts:
        for parent in start.parents:
            if (parent / 'experiments' / 'base' / 'config.json').is_file():
                return parent / 'experiments'
    raise ValueError(f'experiments/ of the lct checkout is neither above {starts[0]} nor above {pathlib.Path.cwd()}; '
                     'run the script from a clone of the repository')
