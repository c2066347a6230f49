"""crc32 of the chunks of a file: any range of it is verified by reading the chunks around that range alone.

A crc32 finds every flipped bit and every burst of 32; a sha256 takes twice the time and would also find what
was forged, which is not the aim here.
"""

import os
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

THREADS = min(8, os.cpu_count() or 1)


def num_chunks(nbytes: int, chunk_bytes: int) -> int:
    """Chunks of a file of nbytes; the last one may be shorter than the others."""
    return -(-nbytes // chunk_bytes)


def chunk_crc32s(path: str | os.PathLike, chunk_bytes: int) -> list[int]:
    """The crc32 of every chunk of a file, read by several threads."""
    with open(path, 'rb', buffering=0) as file, ThreadPoolExecutor(THREADS) as pool:
        count = num_chunks(os.fstat(file.fileno()).st_size, chunk_bytes)
        step = max(1, 2**22 // chunk_bytes)  # chunks of a task
        groups = pool.map(partial(_crc32s, file.fileno(), chunk_bytes),
                          (range(i, min(i + step, count)) for i in range(0, count, step)))
        return [value for group in groups for value in group]


def _crc32s(descriptor: int, chunk_bytes: int, chunks: range) -> list[int]:
    return [zlib.crc32(os.pread(descriptor, chunk_bytes, i * chunk_bytes)) for i in chunks]


def total_crc32(crc32s: Sequence[int]) -> int:
    """One number for a file: the crc32 of the crc32s of its chunks."""
    return zlib.crc32(b''.join(value.to_bytes(4, 'little') for value in crc32s))


class RangeCheck:
    """Verifies ranges of a file before they are used; each chunk is read once.

    error: makes the exception for the first (start, stop) in bytes that differs.
    """

    def __init__(self, path: str | os.PathLike, chunk_bytes: int, crc32s: Sequence[int],
                 error: Callable[[int, int], Exception]):
        self._path, self._chunk_bytes, self._crc32s, self._error = path, chunk_bytes, crc32s, error
        self._verified = bytearray(len(crc32s))  # of several threads two may verify one chunk: no harm

    def __call__(self, start: int, stop: int) -> None:
        """Verify the chunks that hold bytes start..stop."""
        size = self._chunk_bytes
        chunks = [i for i in range(start // size, num_chunks(stop, size)) if not self._verified[i]]
        if not chunks:
            return
        with open(self._path, 'rb', buffering=0) as file:
            for i in chunks:
                if _crc32s(file.fileno(), size, range(i, i + 1)) != [self._crc32s[i]]:
                    raise self._error(i * size, (i + 1) * size)
                self._verified[i] = 1
