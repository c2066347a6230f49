"""The shards of a token store as one array on disk, of which nothing is used that was not verified."""

import bisect
import hashlib
import itertools
import os
import pathlib
import zlib
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

import numpy as np

from lct.checksums import num_chunks

MAX_OPEN = 256  # files


class Shards:
    """The tokens of all shards, one after the other.

    Every read takes complete chunks from the disk and compares their crc32, so that a shard may be altered or
    replaced at any time without being noticed too late, and a read of a few tokens costs one chunk. The
    shards of a store of version 1, which has no such numbers, are verified as a whole at their first use.

    path_of: gives the path of a file by its name. max_open: files at once.
    files: {count, bytes, sha256} of each shard. crc32s: uint32 [chunks of all shards], or None.
    """

    def __init__(self, path_of: Callable[[str], pathlib.Path], files: Sequence[dict[str, Any]],
                 dtype: np.dtype, crc32s: np.ndarray | None, chunk_bytes: int, max_open: int = MAX_OPEN):
        self._path_of, self._files, self._dtype, self._max_open = path_of, files, dtype, max_open
        self._ends = list(itertools.accumulate(file['count'] for file in files))
        self._crc32s, self._chunk_bytes = crc32s, chunk_bytes
        counts = (num_chunks(file['bytes'], chunk_bytes) for file in files)
        self._first_chunks = [0, *itertools.accumulate(counts)]  # index into crc32s
        self._opened, self._verified = {}, {}

    def read(self, at: int, out: np.ndarray) -> None:
        """Fill out with the tokens from number `at` on.

        Raises:
          ValueError: naming a shard that is not as it was written.
          OSError: for a shard that cannot be read now.
        """
        done = 0
        while done < len(out):
            number = bisect.bisect_right(self._ends, at)
            file, itemsize = self._files[number], self._dtype.itemsize
            first = at - (self._ends[number] - file['count'])
            count = min(len(out) - done, file['count'] - first)
            start = file['bytes'] - (file['count'] - first) * itemsize
            try:
                data = self._read(number, start, start + count * itemsize)
            except OSError:  # of a file server: whoever tries again opens the file again
                self._opened.pop(number, None)
                raise
            out[done:done + count] = np.frombuffer(data, self._dtype)
            at, done = at + count, done + count

    def _read(self, number: int, start: int, stop: int) -> memoryview:
        """Bytes start..stop of a shard."""
        file, size = self._open(number), self._chunk_bytes
        if self._crc32s is None:
            self._verify(number, file)
        chunks = range(start // size, num_chunks(stop, size))
        data = memoryview(_read_range(file, chunks.start * size, chunks.stop * size))
        for i in chunks if self._crc32s is not None else ():
            chunk = data[(i - chunks.start) * size:(i - chunks.start + 1) * size]
            if zlib.crc32(chunk) != self._crc32s[self._first_chunks[number] + i]:
                raise damaged(self._path_of(shard_name(number)), f'another crc32 of chunk {i}')
        data = data[start - chunks.start * size:stop - chunks.start * size]
        if len(data) != stop - start:
            raise damaged(self._path_of(shard_name(number)), f'it ends before byte {stop}')
        return data

    def _open(self, number: int) -> BinaryIO:
        file = self._opened.get(number)
        if file is None:
            path = self._path_of(shard_name(number))
            file = open(path, 'rb', buffering=0)  # noqa: SIM115
            check_size(path, self._files[number]['bytes'])
            if len(self._opened) >= self._max_open:
                self._opened.clear()  # a file is closed when its last reader is done with it
            self._opened[number] = file
        return file

    def _verify(self, number: int, file: BinaryIO) -> None:
        """Compare the sha256 of a shard, unless it was done and the file is the same."""
        status = os.fstat(file.fileno())
        state = status.st_ino, status.st_size, status.st_mtime_ns
        if self._verified.get(number) == state:
            return
        digest, size = hashlib.sha256(), status.st_size
        for start in range(0, size, 2**24):
            digest.update(_read_range(file, start, min(start + 2**24, size)))
        if digest.hexdigest() != self._files[number]['sha256']:
            raise damaged(self._path_of(shard_name(number)), 'another sha256')
        self._verified[number] = state


def _read_range(file: BinaryIO, start: int, stop: int) -> bytes:
    """Bytes start..stop of a file, fewer at its end. One call returns at most 2 GiB."""
    parts = []
    while start < stop and (part := os.pread(file.fileno(), min(stop - start, 2**30), start)):
        parts.append(part)
        start += len(part)
    return parts[0] if len(parts) == 1 else b''.join(parts)


def shard_name(number: int) -> str:
    return f'shard-{number:05d}.npy'


class MissingFile(ValueError, OSError):
    """A file of a store is not there. A reader may try again: a file server may be restarting."""


def check_size(path: pathlib.Path, expected: int) -> None:
    """Refuse a file that is missing or does not have the expected bytes."""
    size = path.stat().st_size if path.exists() else None
    if size != expected:
        raise wrong_size(path, size, expected)


def wrong_size(path: pathlib.Path, size: int | None, expected: int) -> ValueError:
    """The error for a file of a store that is missing (size None) or has another size."""
    found = 'is missing' if size is None else f'has {size} bytes where {expected} were written'
    error = MissingFile if size is None else ValueError
    return error(f'{path} {found}; copy it again from an intact store, or tokenize the corpus again')


def damaged(path: pathlib.Path, difference: str) -> ValueError:
    """The error for a file of a store that was altered."""
    return ValueError(f'{path} differs from what was written ({difference}); copy it again from an intact '
                      'store, or tokenize the corpus again')


def sha256_of(path: str | os.PathLike) -> str:
    """sha256 of a file."""
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()
