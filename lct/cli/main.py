"""How a script starts and ends: missing packages, bad flags and interrupts in one sentence."""

import contextlib
import os
import sys
import traceback


@contextlib.contextmanager
def needs(packages):
    """Around imports: a missing package is named, with what pip should install."""
    try:
        yield
    except ModuleNotFoundError as error:
        missing = error.name.partition('.')[0]
        raise ValueError(f'this script needs the package {missing}; pip install {packages}') from error


def check_positive(args, *names):
    """Refuse flags that are given and not above 0."""
    for name in names:
        value = getattr(args, name)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and number < 1:
                raise ValueError(f'--{name.replace("_", "-")} {number} must be a whole number above 0')


def run_script(function, resumes=False):
    """Run a script; what the user can mend ends in one sentence, LCT_TRACEBACK=1 shows where it came from.
    resumes: the same command continues a run that was stopped."""
    from lct import processes

    try:
        function()
    except KeyboardInterrupt:
        print('stopped' + '; the same command continues from the last checkpoint' * resumes, file=sys.stderr)
        processes.leave(130)
    except Exception as error:
        mendable = isinstance(error, (ValueError, FloatingPointError, OSError))
        if mendable and not os.environ.get('LCT_TRACEBACK'):
            text = str(error)
            if isinstance(error, OSError) and error.filename is not None:
                text = f'{error.filename} can be neither read nor written ({error.strerror}); name another file or folder'
            print('error:', ' '.join(text.split()), file=sys.stderr)
        else:
            traceback.print_exc()
        processes.leave(1)
