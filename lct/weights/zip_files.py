"""Zip archives of stored members: where each lies in the file, and archives of a known layout to write in.

Format: PKWARE's APPNOTE.TXT 6.3, sections 4.3 and 4.5; what is written is zip64 throughout, so that the small
archives of the tests are of the same kind as those over 4 GB.
"""

import contextlib
import os
import struct
import zlib

from lct.weights import folders
from lct.weights.json_files import shown

MAX_TABLE = 2**19  # bytes of a directory and of a pickle; those of a 405B model take a quarter of it
ALIGNMENT = 64

LOCAL, CENTRAL, END64, LOCATOR64, END = (b'PK' + x for x in (b'\3\4', b'\1\2', b'\6\6', b'\6\7', b'\5\6'))
_LOCAL, _CENTRAL = struct.Struct('<4s5H3L2H'), struct.Struct('<4s6H3L5H2L')
_END64, _LOCATOR64, _END = struct.Struct('<4sQ2H2L4Q'), struct.Struct('<4sLQL'), struct.Struct('<4s4H2LH')
FULL = 0xFFFFFFFF  # a 32-bit field whose value stands in the zip64 extra field


def read(path, span):
    """The bytes of a small member."""
    offset, size = span
    if size > MAX_TABLE:
        raise ValueError(f'{path} has a table of {size} bytes, too many for a model; copy it again')
    with open(path, 'rb') as file:
        file.seek(offset)
        return file.read(size)


def read_directory(path):
    """{member: (offset, size)} of the data of a zip archive; all stored, none over another."""
    if not os.path.isfile(path):
        raise ValueError(f'{path} is missing; the folder is incomplete, copy it again')
    total = os.path.getsize(path)
    with open(path, 'rb') as file:
        if file.read(4) != LOCAL:
            raise ValueError(f'{path} is not a zip archive, as torch.save has written since 1.6; save it again')
        tail_at = max(0, total - _END.size - 0xFFFF)
        file.seek(tail_at)
        tail = file.read()
        at = tail.rfind(END)
        if at < 0 or len(tail) < at + _END.size:
            raise ValueError(f'{path} is a zip archive without its end; it is truncated, copy it again')
        *_, count, size, offset, _ = _END.unpack_from(tail, at)
        if at >= _LOCATOR64.size and tail[at - _LOCATOR64.size:].startswith(LOCATOR64):
            where = _LOCATOR64.unpack_from(tail, at - _LOCATOR64.size)[2]
            file.seek(min(where, total))
            end64 = file.read(_END64.size)
            if len(end64) < _END64.size or not end64.startswith(END64):
                raise ValueError(f'{path} has a damaged zip directory; copy it again')
            *_, count, size, offset = _END64.unpack(end64)
        if size > MAX_TABLE or offset + size > total:
            raise ValueError(f'{path} has a zip directory of {size} bytes at {offset} of {total}; copy it again')
        file.seek(offset)
        directory = file.read(size)
        members, at = {}, 0
        for _ in range(min(count, size)):
            at = _read_entry(path, directory, at, members, offset, file)
        if at != size or len(members) != count:
            raise ValueError(f'{path} has a zip directory that does not fit its own size; copy it again')
    end = 0
    for start, size in sorted(members.values()):
        if start < end:
            raise ValueError(f'{path} has members that overlap; copy it again')
        end = start + size
    return members


def _read_entry(path, directory, at, members, limit, file):
    """Add one member, which must lie before `limit`; the place of the next entry of the directory."""
    if len(directory) < at + _CENTRAL.size or not directory.startswith(CENTRAL, at):
        raise ValueError(f'{path} has a damaged zip directory; copy it again')
    (_, _, _, flags, method, _, _, _, packed, size, name_len, extra_len, comment_len, *_,
     offset) = _CENTRAL.unpack_from(directory, at)
    at += _CENTRAL.size
    name = directory[at:at + name_len].decode('utf-8', 'replace')
    extra = directory[at + name_len:at + name_len + extra_len]
    size, packed, offset = _zip64(extra, size, packed, offset)
    if method or flags & 1 or size != packed or name in members:
        raise ValueError(f'{path} has the member {shown(name)} compressed, encrypted or twice; save it with torch.save')
    file.seek(offset if offset + _LOCAL.size <= limit else 0)
    local = _LOCAL.unpack(file.read(_LOCAL.size).ljust(_LOCAL.size, b'\0'))
    start = offset + _LOCAL.size + local[-2] + local[-1]
    if offset + _LOCAL.size > limit or local[0] != LOCAL or start + size > limit:
        raise ValueError(f'{path} has the member {shown(name)} outside of the file; it is damaged, copy it again')
    members[name] = (start, size)
    return at + name_len + extra_len + comment_len


def _zip64(extra, *values):
    """values, with those that were too large for their field taken from the zip64 extra field."""
    while len(extra) >= 4:
        kind, size = struct.unpack_from('<2H', extra)
        if kind == 1:
            field = extra[4:4 + size]
            wide = list(struct.unpack_from(f'<{len(field) // 8}Q', field))
            return [wide.pop(0) if x == FULL and wide else x for x in values]
        extra = extra[4 + size:]
    return values


@contextlib.contextmanager
def create(path, members):
    """Create an archive of {name: bytes, or the size of what will be written} and yield {name: offset}; the
    checksums and the directory are written at the end."""
    spans, at = {}, 0
    for name, content in members.items():
        start = at + _LOCAL.size + len(name.encode()) + WIDE.size + PADDING.size
        start += -start % ALIGNMENT
        size = content if isinstance(content, int) else len(content)
        spans[name] = (at, start, size)
        at = start + size
    with open(path, 'wb+') as file:
        # Real blocks, not a sparse file: a full disk must be an error here, not a signal at a later write.
        folders.allocate(file, at)
        for name, content in members.items():
            if not isinstance(content, int):
                file.seek(spans[name][1])
                file.write(content)
        file.flush()
        yield {name: start for name, (_, start, _) in spans.items()}
        _write_directory(file, spans, at)


WIDE, WIDEST, PADDING = struct.Struct('<2H2Q'), struct.Struct('<2H3Q'), struct.Struct('<2H')


def _write_directory(file, spans, at):
    """Local headers and directory of {name: (header, start, size)}; the directory begins at `at`."""
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
