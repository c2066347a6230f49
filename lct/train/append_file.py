"""A file to which records are appended, each completely or not at all."""

import collections
import contextlib
import os
from pathlib import Path


class AppendFile:
    """Keeps records that cannot be written, as on a full disk, until they can.

    header: begins the file where it is new. missed: number of records that were discarded, because MOST are
    waiting.
    """

    MOST = 10_000

    def __init__(self, path: str | os.PathLike, header: bytes = b''):
        self.path, self.missed = Path(path), 0
        self._header, self._waiting, self._descriptor = header, collections.deque(), None

    def add(self, record: bytes) -> None:
        """Take a record, to be written by write."""
        if len(self._waiting) < self.MOST:
            self._waiting.append(record)
        else:
            self.missed += 1

    @property
    def waiting(self) -> int:
        """Number of records that are not written yet."""
        return len(self._waiting)

    def write(self) -> None:
        """Write all records that wait.

        Raises:
          OSError: the file is as it was before, and the records still wait.
        """
        if not self._waiting:
            return
        file = self._open()
        size = os.fstat(file).st_size
        left = memoryview(b''.join(self._waiting) if size else self._header + b''.join(self._waiting))
        try:
            while left:
                left = left[os.write(file, left):]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(file, size)  # half a record would make those after it unreadable
            raise
        self._waiting.clear()

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _open(self) -> int:
        if self._descriptor is not None and not os.fstat(self._descriptor).st_nlink:
            self.close()  # deleted: what is written now would be lost
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        return self._descriptor
