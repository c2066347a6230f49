"""Atomic writes: a file gets its final name when it is complete and on disk, never before."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, BinaryIO

from lct import storage


def user_cache() -> Path:
    """lct/ in the user's cache (XDG_CACHE_HOME, else ~/.cache)."""
    cache = os.environ.get('XDG_CACHE_HOME', '')
    return (Path(cache) if os.path.isabs(cache) else Path.home() / '.cache') / 'lct'


def partial_path(path: str | os.PathLike) -> Path:
    """The temporary name, next to path, of a file that is being written."""
    storage.refuse_remote(path)
    path = Path(path)
    return path.with_name(path.name + '.part')


def publish(partial: str | os.PathLike, path: str | os.PathLike) -> None:
    """Give a finished file its final name, once its bytes are on disk; an old file is replaced."""
    sync(partial)
    os.replace(partial, path)


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary name to write to. At the end of the block the file gets its final name; after an error it
    is removed and an old file under the final name stays as it was."""
    partial = partial_path(path)
    try:
        yield partial
        publish(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike, mode: str = 'w') -> Iterator[IO]:
    """Open a file for writing, mode 'w' (UTF-8, line ends as written) or 'wb'; see atomic_path."""
    text = {} if 'b' in mode else {'encoding': 'utf-8', 'newline': ''}
    with atomic_path(path) as partial, open(partial, mode, **text) as file:
        yield file


def write_atomically(path: str | os.PathLike, content: str | bytes) -> None:
    """Write a file: text as UTF-8, bytes as they are."""
    with atomic_file(path, 'w' if isinstance(content, str) else 'wb') as file:
        file.write(content)


def refuse_lfs_pointer(path: str | os.PathLike) -> None:
    """Raise ValueError for the few lines that git leaves in place of a large file that was not fetched."""
    if not os.path.isfile(path):
        return
    with open(path, 'rb') as file:
        head = file.read(64)
    if head.startswith(b'version https://git-lfs.github.com/'):
        raise ValueError(f'{path} is a git-lfs pointer to the file, not the file itself; run git lfs pull in '
                         'its folder')


def sync(path: str | os.PathLike) -> None:
    """Return when a file's bytes, or a folder's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def allocate(file: BinaryIO, size: int) -> None:
    """Reserve blocks on disk for size bytes; those before the file's position have been written.

    Real blocks instead of a sparse file: a full disk is an error here, not a signal at a later write to a
    memory map.
    """
    if hasattr(os, 'posix_fallocate'):
        os.posix_fallocate(file.fileno(), 0, size)
        return
    zeros = bytes(2**20)  # macOS lacks the call
    while (left := size - file.tell()) > 0:
        file.write(zeros[:left])
    file.flush()
