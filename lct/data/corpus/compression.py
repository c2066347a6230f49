"""Compressed files as streams of their content."""

import gzip
import importlib
import io
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


def _unzstd(raw: IO[bytes], path: str) -> IO[bytes]:
    return io.BufferedReader(optional('pyarrow', path).CompressedInputStream(raw, 'zstd'), BUFFER)


def optional(name: str, path: str) -> ModuleType:
    """A module of an optional package that reads the file at path."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(f"{path} is read with the package {name.split('.')[0]}; pip install "
                         "'.[corpus]'") from None


DECOMPRESSORS = {'.gz': _gunzip, '.zst': _unzstd}  # to add a compression: its function, and its row here
