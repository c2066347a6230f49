"""Atomic folders: a folder gets its final name only when it is complete, even if the writer is killed."""

import contextlib
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator

from lct import files, storage
from lct.weights import manifest


def check_writable(folder: str | os.PathLike, nbytes: int, overwrite: bool = False) -> None:
    """Raise ValueError, before any work is done, if folder cannot be created with nbytes in it."""
    storage.refuse_remote(folder)
    folder = os.path.abspath(folder)
    parent = os.path.dirname(folder)
    if os.path.lexists(folder):
        if not os.path.isdir(folder) or os.path.islink(folder):
            raise ValueError(f'{folder} is not a folder; choose another target')
        if os.listdir(folder) and not overwrite:
            raise ValueError(
                f'{folder} is not empty; choose another target or overwrite it (overwrite=True, --overwrite)')
    if not os.path.isdir(parent):
        raise ValueError(f'{parent} does not exist; create it first')
    probe = _sibling(folder, 'probe')
    try:
        os.mkdir(probe)
        os.rmdir(probe)
    except OSError as error:
        raise ValueError(f'{parent} is not writable ({error.strerror}); choose another target') from None
    free = shutil.disk_usage(parent).free
    if free < nbytes:
        raise ValueError(
            f'{parent} has {free / 1e9:.2f} GB free but {folder} needs {nbytes / 1e9:.2f} GB; free some '
            'space or choose another disk')


@contextlib.contextmanager
def atomic_folder(folder: str | os.PathLike, overwrite: bool = False) -> Iterator[str]:
    """A temporary sibling folder to write in. It becomes folder at the end of the block; an error removes it.

    Its manifest is added, and everything is on disk before the rename, so a folder under its final name is
    complete and can be verified. An overwritten
    folder is first moved aside and only then removed. The next writer of the same folder clears what a killed
    one left.

    Raises:
      ValueError: if folder cannot be written, or is not empty and overwrite is not set.
    """
    folder = os.path.abspath(folder)
    _clear_leftovers(folder)
    check_writable(folder, 0, overwrite)
    temporary = _sibling(folder, 'writing')
    os.mkdir(temporary)
    lock = os.open(temporary, os.O_RDONLY)  # held while this process lives: no other clears the folder
    try:
        with contextlib.suppress(OSError):  # a network file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield temporary
        manifest.write(temporary)
        for name in os.listdir(temporary):
            files.sync(os.path.join(temporary, name))
        files.sync(temporary)
        check_writable(folder, 0, overwrite)  # another process may have written there in the meantime
        _replace(temporary, folder)
    finally:
        os.close(lock)
        shutil.rmtree(temporary, ignore_errors=True)


def _replace(temporary, folder):
    """Rename temporary to folder. An old folder is removed, or restored if the rename fails."""
    aside = None
    if os.path.isdir(folder) and os.listdir(folder):
        aside = _sibling(folder, 'replaced')
        os.rename(folder, aside)
    try:
        os.rename(temporary, folder)
    except OSError:
        if aside:
            os.rename(aside, folder)
        raise
    files.sync(os.path.dirname(folder))
    if aside:
        # Half removed, it must not look like a folder to restore.
        removed = _sibling(folder, 'writing')
        os.rename(aside, removed)
        shutil.rmtree(removed, ignore_errors=True)


def _clear_leftovers(folder):
    """Remove what a killed writer of this folder left, and restore the folder that it had moved aside unless
    another has taken its place. While another process writes, nothing is touched."""
    parent, name = os.path.split(folder)
    if not os.path.isdir(parent):
        return
    leftover = re.compile(rf'\.{re.escape(name)}\.(writing|replaced)-[0-9a-f]{{8}}')
    found = [match for match in map(leftover.fullmatch, sorted(os.listdir(parent))) if match]
    writing, replaced = (
        [os.path.join(parent, match[0]) for match in found if match[1] == purpose]
        for purpose in ('writing', 'replaced')
    )
    if any(map(_in_use, writing)):
        return
    for path in replaced:
        if not os.path.lexists(folder) or os.path.isdir(folder) and not os.listdir(folder):
            os.rename(path, folder)
        else:
            shutil.rmtree(path, ignore_errors=True)
    for path in writing:
        shutil.rmtree(path, ignore_errors=True)


def _in_use(folder):
    """Whether a living process holds the lock of a folder, or may hold it."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _sibling(folder, purpose):
    """A new hidden name beside folder."""
    parent, name = os.path.split(folder)
    return os.path.join(parent, f'.{name}.{purpose}-{secrets.token_hex(4)}')
