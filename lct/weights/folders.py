"""Folders that appear whole or not at all, whatever fails or is killed."""

import contextlib
import fcntl
import os
import re
import secrets
import shutil

from lct import files


def check_writable(folder, nbytes, overwrite=False):
    """Raise ValueError, before any work is done, if folder cannot be created with nbytes in it."""
    folder = os.path.abspath(folder)
    parent = os.path.dirname(folder)
    if os.path.lexists(folder):
        if not os.path.isdir(folder) or os.path.islink(folder):
            raise ValueError(f'{folder} is not a folder; choose another target')
        if os.listdir(folder) and not overwrite:
            raise ValueError(f'{folder} is not empty; choose another target or overwrite it (overwrite=True, --overwrite)')
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
def whole_folder(folder, overwrite=False):
    """A temporary sibling folder to write in, which becomes folder at the end or vanishes on an error.

    Everything is on disk before the rename, so a folder under its final name is a complete one. An
    overwritten folder is first moved aside and only then removed. What a killed process left of this is
    cleared by the next one.
    """
    folder = os.path.abspath(folder)
    _clear_leftovers(folder)
    check_writable(folder, 0, overwrite)
    temporary, aside = _sibling(folder, 'writing'), _sibling(folder, 'replaced')
    os.mkdir(temporary)
    lock = os.open(temporary, os.O_RDONLY)  # held while this process lives: no other takes it for a leftover
    try:
        with contextlib.suppress(OSError):  # a network disk without locks
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield temporary
        for name in os.listdir(temporary):
            files.sync(os.path.join(temporary, name))
        files.sync(temporary)
        check_writable(folder, 0, overwrite)  # someone may have written there meanwhile
        moved = os.path.isdir(folder) and bool(os.listdir(folder))
        if moved:
            os.rename(folder, aside)
        try:
            os.rename(temporary, folder)
        except OSError:
            if moved:
                os.rename(aside, folder)
            raise
        files.sync(os.path.dirname(folder))
        if moved:
            # Half removed it must not look like a folder to restore.
            rubbish = _sibling(folder, 'writing')
            os.rename(aside, rubbish)
            shutil.rmtree(rubbish, ignore_errors=True)
    finally:
        os.close(lock)
        shutil.rmtree(temporary, ignore_errors=True)


def _clear_leftovers(folder):
    """Remove what a killed writer of this folder left behind, and put the folder that it had moved aside back
    if nothing has taken its place. While another process writes, nothing is touched."""
    parent, name = os.path.split(folder)
    if not os.path.isdir(parent):
        return
    ours = re.compile(rf'\.{re.escape(name)}\.(writing|replaced)-[0-9a-f]{{8}}')
    found = [match for match in map(ours.fullmatch, sorted(os.listdir(parent))) if match]
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
    """Whether a living process holds the lock of a folder, or may do so."""
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
    parent, name = os.path.split(folder)
    return os.path.join(parent, f'.{name}.{purpose}-{secrets.token_hex(4)}')


def allocate(file, size):
    """Blocks on disk for size bytes, of which those before the file's position are written."""
    if hasattr(os, 'posix_fallocate'):
        os.posix_fallocate(file.fileno(), 0, size)
        return
    zeros = bytes(2**20)  # macOS lacks the call
    while (left := size - file.tell()) > 0:
        file.write(zeros[:left])
    file.flush()
