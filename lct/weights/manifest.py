"""lct_manifest.json: the checksums of a folder, written with it and compared when its files are read.

A file of its own rather than fields of each format, because it covers all formats and the files beside the
weights too, other readers ignore it, and whoever changes a file on purpose can delete it. The crc32 of every
4 MiB lets a process verify just the part of a file that it reads, while it reads it.
"""

import json
import math
import os
import re
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from lct.checksums import RangeCheck, chunk_crc32s, num_chunks, total_crc32
from lct.json_files import read_json, short_repr, write_json
from lct.weights.tensors import FLOATS, Tensor

NAME = 'lct_manifest.json'
FORMAT, VERSION = 'lct manifest', 1
CHUNK = 2**22  # bytes
FOR_READERS = re.compile(r'(README|LICENSE|NOTICE|USE_POLICY).*')  # no program reads them, people edit them
WEIGHTS = ('.safetensors', '.pth')


class File(NamedTuple):
    """bytes: its size. crc32s: of its chunks."""
    bytes: int
    crc32s: tuple[int, ...]


def write(folder: str | os.PathLike) -> None:
    """Write the manifest of all files in a folder and its subfolders."""
    entries = {}
    for name in _file_names(folder):
        path = os.path.join(folder, name)
        crc32s = chunk_crc32s(path, CHUNK)
        entries[name] = {'bytes': os.path.getsize(path), 'crc32': ''.join(f'{value:08x}' for value in crc32s)}
    content = {'format': FORMAT, 'version': VERSION, 'chunk': CHUNK, 'files': entries}
    write_json(os.path.join(folder, NAME), {**content, 'crc32': _crc32_of(content)})


def _file_names(folder):
    """Paths of the files below a folder that programs read, relative to it."""
    for root, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            if name != NAME and not FOR_READERS.fullmatch(name):
                yield os.path.relpath(os.path.join(root, name), folder)


def _crc32_of(content: dict[str, Any]) -> int:
    rest = {key: value for key, value in content.items() if key != 'crc32'}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


def read(folder: str | os.PathLike) -> dict[str, File] | None:
    """{name: File} of the manifest of a folder; None if it has none, as the folders of other programs.

    Raises:
      ValueError: for a manifest that is not as it was written.
    """
    path = os.path.join(folder, NAME)
    if not os.path.lexists(path):
        return None
    try:
        content = read_json(path)
        if content.get('crc32') != _crc32_of(content):
            raise ValueError(f'{path} differs from what was written (another crc32)')
        if (content.get('format'), content.get('version'), content.get('chunk')) != (FORMAT, VERSION, CHUNK):
            raise ValueError(f'{path} is of version {short_repr(content.get("version"))}, this release reads '
                             f'{VERSION}')
        return {name: _parse(path, name, entry) for name, entry in content['files'].items()}
    except (ValueError, AttributeError, KeyError) as error:
        raise ValueError(f'{error}; copy the folder again, or delete {NAME} to read it unverified') from None


def _parse(path, name, entry):
    size, digits = entry.get('bytes'), entry.get('crc32')
    if not isinstance(size, int) or not isinstance(digits, str) or (
            not re.fullmatch('([0-9a-f]{8})*', digits) or len(digits) != 8 * num_chunks(size, CHUNK)):
        raise ValueError(f'{path} has an invalid entry of {short_repr(name)}')
    return File(size, tuple(int(digits[i:i + 8], 16) for i in range(0, len(digits), 8)))


def verified(folder: str | os.PathLike, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """{name: Tensor} of files in a folder, which verify what is read of them if the folder has a manifest.

    Raises:
      ValueError: for a file of another size than was written, or with another header; on reading, for a range
        of tensors that was altered.
    """
    files = read(folder)
    if files is None:
        return tensors
    by_path = {}
    for name, tensor in tensors.items():
        by_path.setdefault(tensor.path, {})[name] = tensor
    result = {}
    for path, held in by_path.items():
        file = files.get(os.path.relpath(path, folder))
        if file is None:
            raise ValueError(f'{path} is not in {NAME}, which was written for other weights; '
                             f'delete {NAME} to read it unverified')
        check = _range_check(path, file, held)
        check(0, min(tensor.offset for tensor in held.values()))  # its tables
        check(max(tensor.offset + tensor_bytes(tensor) for tensor in held.values()), file.bytes)
        result |= {name: tensor._replace(check=check) for name, tensor in held.items()}
    return {name: result[name] for name in tensors}


def _range_check(path, file: File, tensors: dict[str, Tensor]) -> RangeCheck:
    """The check of one file; its error names the tensors in the range."""
    size = os.path.getsize(path)
    if size != file.bytes:
        raise _differs(path, f'{size} bytes instead of {file.bytes}')

    def error(start, stop):
        names = [name for name, tensor in tensors.items()
                 if tensor.offset < stop and start < tensor.offset + tensor_bytes(tensor)]
        place = ' to '.join(repr(name) for name in dict.fromkeys((names[0], names[-1]))) if names else 'none'
        return _differs(path, f'another crc32 of bytes {start} to {min(stop, size)}, tensor {place}')

    return RangeCheck(path, CHUNK, file.crc32s, error)


def tensor_bytes(tensor: Tensor) -> int:
    itemsize = FLOATS[tensor.dtype].itemsize if tensor.dtype in FLOATS else 1  # others are refused later
    return math.prod(tensor.shape) * itemsize


def _differs(path, difference):
    return ValueError(f'{path} differs from what was written ({difference}); copy it again, or delete {NAME} '
                      'if it was changed on purpose')


def verify(folder: str | os.PathLike) -> None:
    """Read all files of a folder and compare them with its manifest, if it has one.

    Raises:
      ValueError: naming the first file that is missing or differs.
    """
    for name, file in (read(folder) or {}).items():
        if (difference := _difference(os.path.join(folder, name), file)) is not None:
            raise _differs(os.path.join(folder, name), difference)


def edited(folder: str | os.PathLike) -> list[str]:
    """A sentence for each file beside the weights that differs from what was written; [] without manifest."""
    out = []
    for name, file in (read(folder) or {}).items():
        path = os.path.join(folder, name)
        if os.sep in name or name.endswith(WEIGHTS) or not os.path.exists(path):
            continue
        if (difference := _difference(path, file)) is not None:
            out.append(f'{path} differs from what was written ({difference}); copy it again, unless it was '
                       'changed on purpose')
    return out


def _difference(path, file: File) -> str | None:
    """In what a file differs from its entry."""
    if not os.path.exists(path):
        return 'it is missing'
    if (size := os.path.getsize(path)) != file.bytes:
        return f'{size} bytes instead of {file.bytes}'
    return None if tuple(chunk_crc32s(path, CHUNK)) == file.crc32s else 'another crc32'


def file_totals(folder: str | os.PathLike, suffixes: Sequence[str]) -> dict[str, list[int]]:
    """{name: [bytes, crc32 of the crc32s of all its chunks]} of the files of a folder with one of suffixes.

    Files with an entry in the manifest are not read, since they are compared with it when they are used.
    """
    files, out = read(folder) or {}, {}
    for name in sorted(name for name in os.listdir(folder) if name.endswith(tuple(suffixes))):
        path = os.path.join(folder, name)
        size = os.path.getsize(path)
        file = files.get(name)
        known = file is not None and file.bytes == size
        out[name] = [size, total_crc32(file.crc32s if known else chunk_crc32s(path, CHUNK))]
    return out
