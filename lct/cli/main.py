"""Running a script: missing packages, invalid flags and interrupts end in one sentence."""

import argparse
import contextlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Collection, Iterator

from lct import exit_status, lost_interrupts, stop_signals
from lct.cli import program_cache
from lct.cli.urls import check_arguments
from lct.deferred_signals import deferred
from lct.terminal import write_line


@contextlib.contextmanager
def needs(packages: str) -> Iterator[None]:
    """Around imports: the error for a missing package states what to install with pip."""
    try:
        yield
    except ModuleNotFoundError as error:
        missing = error.name.partition('.')[0]
        raise ValueError(f'this script needs the package {missing}; pip install {packages}') from error


def check_positive(args: argparse.Namespace, *names: str) -> None:
    """Refuse flags that are given and not above 0."""
    for name in names:
        value = getattr(args, name)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and number < 1:
                raise ValueError(f'--{name.replace("_", "-")} {number} must be a whole number above 0')


def run_script(function: Callable[[], object], resumes: bool = False, urls: Collection[str] = ()) -> None:
    """Run a script. An error ends in one sentence and its exit_status, or ERROR if it has none;
    LCT_TRACEBACK=1 shows the traceback.

    resumes: whether the same command continues an interrupted run. SIGTERM, SIGUSR1 and SIGHUP are then like
      Ctrl-C.
    urls: flags whose values may have a scheme such as s3://; '' are the arguments without a flag.
    """
    with lost_interrupts.resent():
        try:
            with deferred():  # imports jax: what a signal raises in there may be ignored
                from lct import processes
                program_cache.enable()
        except KeyboardInterrupt:
            write_line('stopped', sys.stderr)
            raise SystemExit(exit_status.STOPPED) from None
        _run(function, resumes, urls, processes)


def _run(function, resumes, urls, processes):
    signals = stop_signals.catch(lambda name: None, interrupt=True)
    try:
        check_arguments(sys.argv[1:], urls)
        with signals if resumes else contextlib.nullcontext():
            function()
    except KeyboardInterrupt:
        write_line('stopped' + '; the same command continues from the last checkpoint' * resumes, sys.stderr)
        processes.leave(exit_status.STOPPED)
    except Exception as raised:
        error = processes.explain(raised)
        sentence = _plain(_sentence(error))
        if os.environ.get('LCT_TRACEBACK'):
            traceback.print_exc()
        else:
            write_line('error: ' + sentence, sys.stderr)
        processes.leave(getattr(error, 'exit_status', exit_status.ERROR), sentence)


def _plain(text):
    """Text without runs of blanks; several problems keep a line each."""
    return '\n'.join(' '.join(line.split()) for line in text.split('\n')) if re.match(
        r'\d+ problems\n', text) else ' '.join(text.split())


def _sentence(error):
    if isinstance(error, OSError) and error.filename is not None:
        return (f'{error.filename} can be neither read nor written ({error.strerror}); name another file or '
                'folder')
    if isinstance(error, (ValueError, FloatingPointError, OSError)) or hasattr(error, 'exit_status'):
        return str(error)
    if type(error).__name__ in ('JaxRuntimeError', 'XlaRuntimeError', 'MemoryError'):
        from lct.out_of_memory import is_out_of_memory, reason_of

        if is_out_of_memory(error):
            return f'out of memory ({reason_of(error)}); use more devices or shorter sequences'
    place = traceback.extract_tb(error.__traceback__)[-1]
    text = (str(error).strip() or 'no message').splitlines()[0][:300]
    return (f'{type(error).__name__}: {text} ({place.filename}:{place.lineno}); LCT_TRACEBACK=1 shows the '
            'traceback')
