"""Compressed files as streams of their content."""

import bz2
import gzip
import importlib
import io
import lzma
from pathlib import Path
from types import ModuleType
from typing import IO

BUFFER = 2**17  # bytes


def open_stream(raw: IO[bytes], path: str) -> IO[bytes]:
    """The decompressed stream of a file; its read(n) gives n bytes unless the file ends."""
    decompress = DECOMPRESSORS.get(Path(path.lower()).suffix)
    return decompress(raw, path) if decompress else raw


def _gunzip(raw: IO[bytes], _path: str) -> IO[bytes]:
    return gzip.GzipFile(fileobj=raw)


def _bunzip2(raw: IO[bytes], _path: str) -> IO[bytes]:
    return bz2.BZ2File(raw)


def _unxz(raw: IO[bytes], path: str) -> IO[bytes]:
    return io.BufferedReader(_Xz(raw, path), BUFFER)


class _Xz(io.RawIOBase):
    """lzma.LZMAFile, whose error is not an OSError as those of the other formats are."""

    def __init__(self, raw, path):
        self._file, self._path = lzma.LZMAFile(raw), path

    def readable(self):
        return True

    def readinto(self, buffer):
        try:
            data = self._file.read(len(buffer))
        except lzma.LZMAError as error:
            raise OSError(str(error)) from error
        buffer[:len(data)] = data
        return len(data)


def _unzstd(raw: IO[bytes], path: str) -> IO[bytes]:
    return io.BufferedReader(_optional_stream(raw, path, 'zstd'), BUFFER)


def _unlz4(raw: IO[bytes], path: str) -> IO[bytes]:
    return io.BufferedReader(_optional_stream(raw, path, 'lz4'), BUFFER)


def _optional_stream(raw, path, codec):
    return optional('pyarrow', path).CompressedInputStream(raw, codec)


def optional(name: str, path: str) -> ModuleType:
    """A module of an optional package that reads the file at path."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(f"{path} is read with the package {name.split('.')[0]}; pip install "
                         "'.[corpus]'") from None


# To add a compression: its function, and its row here
DECOMPRESSORS = {'.gz': _gunzip, '.zst': _unzstd, '.bz2': _bunzip2, '.xz': _unxz, '.lz4': _unlz4}
