"""Zip archives of stored (uncompressed) members: their places in the file, and archives written in place.

Format: PKWARE's APPNOTE.TXT 6.3, sections 4.3 and 4.5. All archives are written as zip64, so that the small
ones of the tests have the same format as those over 4 GB.
"""

import contextlib
import os
import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from lct import files
from lct.json_files import short_repr

MAX_TABLE = 2**19  # bytes of a directory or of a pickle; a 405B model needs a quarter
ALIGNMENT = 64

LOCAL, CENTRAL, END64, LOCATOR64, END = (b'PK' + x for x in (b'\3\4', b'\1\2', b'\6\6', b'\6\7', b'\5\6'))
_LOCAL, _CENTRAL = struct.Struct('<4s5H3L2H'), struct.Struct('<4s6H3L5H2L')
_END64, _LOCATOR64, _END = struct.Struct('<4sQ2H2L4Q'), struct.Struct('<4sLQL'), struct.Struct('<4s4H2LH')
FULL = 0xFFFFFFFF  # a 32-bit field whose value is in the zip64 extra field

Span = tuple[int, int]  # (offset, size) in bytes


# ---------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------


def read(path: str | os.PathLike, span: Span) -> bytes:
    """The bytes of a small member."""
    offset, size = span
    if size > MAX_TABLE:
        raise ValueError(
            f'{path} has a table of {size} bytes, too many for a model (at most {MAX_TABLE}); copy it again')
    with open(path, 'rb') as file:
        file.seek(offset)
        return file.read(size)


def read_directory(path: str | os.PathLike) -> dict[str, Span]:
    """{member: (offset, size) of its data} of a zip archive.

    Raises:
      ValueError: unless the archive is complete and all members are stored, within the file, without overlap.
    """
    if not os.path.isfile(path):
        raise ValueError(f'{path} is missing; the folder is incomplete, copy it again')
    total = os.path.getsize(path)
    with open(path, 'rb') as file:
        if file.read(4) != LOCAL:
            raise ValueError(
                f'{path} is not a zip archive, as torch.save has written since 1.6; save it again')
        count, size, offset = _find_directory(path, file, total)
        if size > MAX_TABLE or offset + size > total:
            raise ValueError(
                f'{path} has a zip directory of {size} bytes at {offset} of {total}; copy it again')
        file.seek(offset)
        directory = file.read(size)
        members, end = {}, 0
        for _ in range(min(count, size)):
            end = _read_entry(path, directory, end, members, offset, file)
        if end != size or len(members) != count:
            raise ValueError(f'{path} has a zip directory that does not fit its own size; copy it again')
    _check_overlap(path, members.values())
    return members


def _find_directory(path, file, total):
    """(members, size in bytes, offset) of the directory of a file of `total` bytes."""
    file.seek(max(0, total - _END.size - 0xFFFF))
    tail = file.read()
    end = tail.rfind(END)
    if end < 0 or len(tail) < end + _END.size:
        raise ValueError(f'{path} is a zip archive without its end; it is truncated, copy it again')
    *_, count, size, offset, _ = _END.unpack_from(tail, end)
    if end >= _LOCATOR64.size and tail[end - _LOCATOR64.size:].startswith(LOCATOR64):
        end64 = _LOCATOR64.unpack_from(tail, end - _LOCATOR64.size)[2]
        file.seek(min(end64, total))
        record = file.read(_END64.size)
        if len(record) < _END64.size or not record.startswith(END64):
            raise ValueError(f'{path} has a damaged zip directory; copy it again')
        *_, count, size, offset = _END64.unpack(record)
    return count, size, offset


def _check_overlap(path, spans):
    end = 0
    for start, size in sorted(spans):
        if start < end:
            raise ValueError(f'{path} has members that overlap; copy it again')
        end = start + size


def _read_entry(path, directory, at, members, limit, file):
    """Add the member of the directory entry that begins at `at` to members; its data must end before `limit`.
    Returns the beginning of the next entry."""
    if len(directory) < at + _CENTRAL.size or not directory.startswith(CENTRAL, at):
        raise ValueError(f'{path} has a damaged zip directory; copy it again')
    (_, _, _, flags, method, _, _, _, packed, size, name_len, extra_len, comment_len, *_,
     offset) = _CENTRAL.unpack_from(directory, at)
    at += _CENTRAL.size
    name = directory[at:at + name_len].decode('utf-8', 'replace')
    extra = directory[at + name_len:at + name_len + extra_len]
    size, packed, offset = _zip64(extra, size, packed, offset)
    if method or flags & 1 or size != packed or name in members:
        raise ValueError(
            f'{path} has the member {short_repr(name)} compressed, encrypted or twice; '
            'save it with torch.save')
    file.seek(offset if offset + _LOCAL.size <= limit else 0)
    local = _LOCAL.unpack(file.read(_LOCAL.size).ljust(_LOCAL.size, b'\0'))
    start = offset + _LOCAL.size + local[-2] + local[-1]
    if offset + _LOCAL.size > limit or local[0] != LOCAL or start + size > limit:
        raise ValueError(
            f'{path} has the member {short_repr(name)} outside of the file; it is damaged, copy it again')
    members[name] = (start, size)
    return at + name_len + extra_len + comment_len


def _zip64(extra, *values):
    """The values of 32-bit fields; those that are FULL are taken from the zip64 extra field."""
    while len(extra) >= 4:
        kind, size = struct.unpack_from('<2H', extra)
        if kind == 1:
            field = extra[4:4 + size]
            wide = list(struct.unpack_from(f'<{len(field) // 8}Q', field))
            return [wide.pop(0) if x == FULL and wide else x for x in values]
        extra = extra[4 + size:]
    return values


# ---------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------

WIDE, WIDEST, PADDING = struct.Struct('<2H2Q'), struct.Struct('<2H3Q'), struct.Struct('<2H')


@contextlib.contextmanager
def create(path: str | os.PathLike, members: dict[str, bytes | int]) -> Iterator[dict[str, int]]:
    """Create an archive of {name: content, or the size of a content that the caller writes} and yield {name:
    offset}; the checksums and the directory are written at the end."""
    spans, at = {}, 0
    for name, content in members.items():
        start = at + _LOCAL.size + len(name.encode()) + WIDE.size + PADDING.size
        start += -start % ALIGNMENT
        size = content if isinstance(content, int) else len(content)
        spans[name] = (at, start, size)
        at = start + size
    with open(path, 'wb+') as file:
        files.allocate(file, at)
        for name, content in members.items():
            if not isinstance(content, int):
                file.seek(spans[name][1])
                file.write(content)
        file.flush()
        yield {name: start for name, (_, start, _) in spans.items()}
        _write_directory(file, spans, at)


def _write_directory(file: BinaryIO, spans, at):
    """Write the local headers and, at offset `at`, the directory of {name: (header offset, offset, size)}."""
    directory = b''
    for name, (header, start, size) in spans.items():
        name, checksum = name.encode(), _checksum(file, start, size)
        fixed = (0x800, 0, 0, 0x21, checksum, FULL, FULL, len(name))  # utf-8 name, stored, 1 January 1980
        padding = start - header - _LOCAL.size - len(name) - WIDE.size - PADDING.size
        extra = WIDE.pack(1, 16, size, size) + PADDING.pack(0x4246, padding) + bytes(padding)
        file.seek(header)
        file.write(_LOCAL.pack(LOCAL, 45, *fixed, len(extra)) + name + extra)
        extra = WIDEST.pack(1, 24, size, size, header)
        directory += _CENTRAL.pack(CENTRAL, 45, 45, *fixed, len(extra), 0, 0, 0, 0, FULL) + name + extra
    file.seek(at)
    count, size = len(spans), len(directory)
    file.write(directory)
    file.write(_END64.pack(END64, _END64.size - 12, 45, 45, 0, 0, count, count, size, at))
    file.write(_LOCATOR64.pack(LOCATOR64, 0, at + size, 1))
    file.write(_END.pack(END, 0, 0, min(count, 0xFFFF), min(count, 0xFFFF), FULL, FULL, 0))


def _checksum(file, start, size):
    result = 0
    file.seek(start)
    for done in range(0, size, 2**24):
        result = zlib.crc32(file.read(min(2**24, size - done)), result)
    return result
