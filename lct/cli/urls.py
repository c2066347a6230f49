"""Where the user's paths may have a scheme such as s3://, and the local folders that stand for them."""

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from lct import mirror, storage
from lct.terminal import write_line

TEXTS = {'--question', '--ask', '--stop', '--url'}  # flags whose values are not paths
CONFIG = {'config.corpus', 'config.model_folder'}  # fields that may be URLs


def check_arguments(arguments: Sequence[str], flags: Collection[str]) -> None:
    """Refuse paths with a scheme as values of flags that do not take them, before anything is imported.

    flags: those that do; '' are the arguments without a flag.

    Raises:
      ValueError: see storage.refuse_remote and storage.check_scheme.
    """
    flag = ''
    for argument in arguments:
        if argument.startswith('--'):
            flag, _, argument = argument.partition('=')
        field, equals, value = argument.partition('=')  # NAME=SOURCE
        if storage.scheme_of(argument) or not equals:
            field, equals, value = '', '', argument
        if flag not in TEXTS and flag != '--set':  # its fields are checked with the config
            _check(value, f'{flag} {field}{equals}', flag in flags)


def check_config(config: Any) -> None:
    """Refuse paths with a scheme in the fields of a config (plain values), but for those of CONFIG."""
    def check(value, name):
        if isinstance(value, str):
            _check(value, name, name in CONFIG)
        elif isinstance(value, (list, dict)):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                check(item, f'{name}.{key}')

    check(config, 'config')


def _check(value, name, is_supported):
    if storage.scheme_of(value):
        (storage.check_scheme if is_supported else storage.refuse_remote)(value, name)


@contextlib.contextmanager
def work_folder(workdir: str | Path, process: int = 0,
                wait_for_all: Callable[[], object] = lambda: None) -> Iterator[Path]:
    """The local folder of a work directory, which is uploaded if its path has a scheme.

    Of several processes the first one uploads. Those of several hosts must share the folder, as for any work
    directory, but not for gs:// (see mirror).
    process: number of this one. wait_for_all: returns when every process has called it.

    Raises:
      ValueError, storage.StorageError: see mirror.Mirror.
    """
    if not storage.scheme_of(workdir):
        yield Path(workdir)
    elif process == 0:
        with mirror.mirrored(workdir, write_line) as folder:
            write_line(f'{storage.url_of(workdir)} is mirrored in {folder}')
            wait_for_all()
            yield folder
        write_line(f'all of {folder} is in {storage.url_of(workdir)}')
    else:
        wait_for_all()
        yield mirror.copy(workdir, process)
