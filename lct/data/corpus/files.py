"""The documents in the files of a corpus.

blocks() reads a file block by block, texts() gives the documents of a block; listing.find gives the files.
Memory follows the longest document, not the size of the corpus. Reading is two functions because blocks()
(bytes off the disk, cut at line ends) is cheap and must run in order; texts() (JSON, Unicode) may run in any
process.
"""

import codecs
import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from lct.data.corpus import mail, notebooks
from lct.data.corpus.arrow_files import arrow_blocks, parquet_blocks
from lct.data.corpus.blocks import (
    BLOCK,
    FIELDS,
    MAX_LINE,
    ROWS,
    Block,
    Fields,
    File,
    Splitter,
    Text,
    field_of,
)
from lct.data.corpus.compression import DECOMPRESSORS, open_stream
from lct.data.corpus.tar_files import tar_blocks

TEXT_SUFFIXES = frozenset('.txt .text .md .rst .tex .html .xml .csv .py .pyi .c .h .cc .cpp .hpp .cu '
                          '.rs .go .java .js .ts .rb .sh .sql .toml .yaml .yml'.split())
UTF8_SEQUENCE = re.compile(rb'[\xc2-\xf4][\x80-\xbf]+')
NOT_LATIN1 = re.compile(rb'[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f\x81\x8d\x8f\x90\x9d\xff]')  # Windows-1252, too


def blocks(file: File, split: Splitter, fields: Fields = FIELDS) -> Iterator[Block]:
    """The Blocks of a File. Their order and sizes depend on its content alone.

    split: called with a stream of str and size=BLOCK, for a text file.

    Raises:
      ValueError: for a file that is truncated or damaged.
    """
    try:
        yield from RECORDS.get(kind_of(file), _text_blocks)(file, fields, split)
    except (EOFError, zlib.error, OSError) as error:
        if getattr(error, 'errno', None) is not None:  # of the disk; errors of decompressors have no number
            raise
        raise ValueError(f'{file.path} is truncated or damaged ({error}); copy it again') from None


def kind_of(file: File) -> str:
    """The suffix that decides how a file is read."""
    path = Path(file.path.lower())
    return file.kind or (path.with_suffix('') if path.suffix in DECOMPRESSORS else path).suffix


def texts(block: Block, fields: Fields = FIELDS) -> Iterator[Text]:
    """The Texts of a Block, empty ones included. Blank lines are skipped."""
    if isinstance(block.data, Text):
        yield block.data
        return
    is_lines = isinstance(block.data, bytes)
    for number, record in enumerate(block.data.split(b'\n') if is_lines else block.data, block.first):
        if is_lines and not record.strip():
            continue
        name, source = f'{block.file.name}:{number}', block.file.source
        try:
            if record is None:
                raise ValueError('is not UTF-8 text')
            values = _parse(record) if is_lines else record
            text = field_of(values, fields.text)
            if fields.source is not None:
                source = field_of(values, fields.source)
            yield Text(name, source, text)
        except ValueError as error:
            place = f'{block.file.path} {"line" if is_lines else "row"} {number}'
            yield Text(name, source, '', error=f'{place} {error}; correct or remove it')


def _parse(line: bytes) -> Any:
    """The JSON value of a line. Raises ValueError with a predicate; the caller adds file and line."""
    try:
        return json.loads(line.decode('utf-8'))
    except UnicodeDecodeError as error:
        raise ValueError(f'is not UTF-8 text (byte {error.start} of the line)') from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f'is not valid JSON ({error})') from None


def _text_blocks(file: File, _fields: Fields, split: Splitter) -> Iterator[Block]:
    # Read twice: an error after the first block would be found when the beginning is already tokenized.
    with open(file.path, 'rb') as raw, open_stream(raw, file.path) as stream:
        encoding, error = _encoding(stream, file.path)
        if error is not None:
            yield Block(file, Text(file.name, file.source, '', error=error), 0, raw.tell())
            return
    is_latin1 = encoding != 'utf-8-sig'
    with open(file.path, 'rb') as raw, open_stream(raw, file.path) as stream:
        decoder = codecs.getincrementaldecoder(encoding)()
        segments = iter(split((decoder.decode(data, final=not data) for data in _reads(stream)), size=BLOCK))
        segment, exact = next(segments)
        for following in segments:
            text = Text(file.name, file.source, segment, ends_document=False, latin1=is_latin1)
            yield Block(file, text, len(segment), raw.tell(), exact=exact)
            segment, exact = following
        yield Block(file, Text(file.name, file.source, segment, latin1=is_latin1), len(segment), raw.tell())


def _reads(stream: IO[bytes]) -> Iterator[bytes]:
    """The content of a stream, BLOCK bytes at a time, and then b''."""
    while data := stream.read(BLOCK):
        yield data
    yield b''


def _encoding(stream: IO[bytes], path: str) -> tuple[str, str | None]:
    """(encoding, None), or a sentence about the first byte that is not UTF-8.

    A file without any sequence of UTF-8 and without bytes that no Latin-1 text has is read as Latin-1 (as
    browsers do, as Windows-1252): damaged UTF-8 is refused, not decoded to other letters.
    """
    decoder = codecs.getincrementaldecoder('utf-8')()
    size, line, before = 0, 1, b''
    may_be_latin1 = True
    for data in _reads(stream):
        pending = len(decoder.getstate()[0])  # the first bytes of a character that ends in data
        may_be_latin1 &= not NOT_LATIN1.search(data) and not UTF8_SEQUENCE.search(before + data)
        try:
            decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            line += error.object[:error.start].count(b'\n')
            place = size - pending + error.start
            cut = not data or error.reason == 'unexpected end of data'
            if may_be_latin1 and not cut and all(
                    not NOT_LATIN1.search(rest) and not UTF8_SEQUENCE.search(rest) for rest in
                    _reads(stream)):
                return 'cp1252', None
            return '', (f'{path} line {line} is not UTF-8 text (byte {place} of the file); convert it or '
                        'leave it out')
        size, line, before = size + len(data), line + data.count(b'\n'), data[-1:]
    return 'utf-8-sig', None


def _line_blocks(file: File, _fields: Fields, _split: Splitter) -> Iterator[Block]:
    with open(file.path, 'rb') as raw, open_stream(raw, file.path) as stream:
        incomplete, size, number = [], 0, 1  # reads that end inside a line, which may be longer than many
        for data in _reads(stream):
            if number == 1 and not size:
                data = data.removeprefix(codecs.BOM_UTF8)
            end = data.rfind(b'\n') + 1 if data else 0
            if data and not end:
                size += len(data)
                incomplete = [*incomplete, data] if size <= MAX_LINE else []
                continue
            if size > MAX_LINE:
                length = data.find(b'\n') + 1
                yield _refused_line(file, number, size + length, raw.tell())
                data, end, number = data[length:], end - length, number + 1
            lines = b''.join([*incomplete, data[:end]])
            incomplete, size = [data[end:]], len(data) - end
            if lines:
                yield Block(file, lines, len(lines), raw.tell(), first=number)
            number += lines.count(b'\n')


def _refused_line(file: File, number: int, size: int, bytes_read: int) -> Block:
    error = (f'{file.path} line {number} has {size:,} bytes, and a line may have {MAX_LINE:,}; cut it into '
             'several records, or put its text into a file of its own')
    return Block(file, Text(f'{file.name}:{number}', file.source, '', error=error), 0, bytes_read, number)


def _json_blocks(file: File, fields: Fields, split: Splitter) -> Iterator[Block]:
    """The elements of an array of records or of strings; any other JSON is one text."""
    with open(file.path, 'rb') as raw, open_stream(raw, file.path) as stream:
        begin = stream.read(BLOCK)
        is_array = begin.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b'['
        content = begin + stream.read(MAX_LINE - len(begin) + 1) if is_array else b''
    if len(content) > MAX_LINE:
        raise ValueError(f'{file.path} is a JSON array of more than {MAX_LINE:,} bytes, which would be in '
                         "memory as a whole; write it as .jsonl, for example with jq -c '.[]'")
    try:
        rows = json.loads(content.removeprefix(codecs.BOM_UTF8)) if is_array else []
    except (ValueError, RecursionError):  # not JSON after all
        rows = []
    first = fields.text.split('.')[0]
    if not any(isinstance(row, str) or isinstance(row, dict) and first in row for row in rows):
        yield from _text_blocks(file, fields, split)
        return
    for start in range(0, len(rows), ROWS):
        chunk = [_as_record(row, fields.text) for row in rows[start:start + ROWS]]
        size = len(content) * min(start + ROWS, len(rows)) // len(rows)
        yield Block(file, chunk, size - len(content) * start // len(rows), os.path.getsize(file.path), start)


def _as_record(value: Any, field: str) -> Any:
    """A string as a record with this field."""
    for key in reversed(field.split('.') if isinstance(value, str) else ()):
        value = {key: value}
    return value


def _decoded_blocks(file: File, _fields: Fields, _split: Splitter) -> Iterator[Block]:
    """The messages of mail, or the cells of a notebook."""
    is_mbox, decode = kind_of(file) == '.mbox', mail.message_text
    if kind_of(file) == '.ipynb':
        decode = notebooks.notebook_text
    with open(file.path, 'rb') as raw, open_stream(raw, file.path) as stream:
        for number, content in enumerate(mail.messages(stream) if is_mbox else [stream.read()], 1):
            name = f'{file.name}:{number}' if is_mbox else file.name
            try:
                text = Text(name, file.source, decode(content))
            except ValueError as error:
                text = Text(name, file.source, '', error=f'{file.path} {error}; correct or remove it')
            yield Block(file, text, len(text.text), raw.tell(), number)


# To add a format of records: its function, and its row here. Any other file is one text.
RECORDS = {'.jsonl': _line_blocks, '.ndjson': _line_blocks, '.json': _json_blocks,
           '.parquet': parquet_blocks, '.arrow': arrow_blocks, '.feather': arrow_blocks,
           '.eml': _decoded_blocks, '.mbox': _decoded_blocks, '.ipynb': _decoded_blocks,
           '.tar': tar_blocks, '.tgz': tar_blocks}
PACKED = frozenset(('.parquet', '.arrow', '.feather', '.tgz'))  # which compress by themselves
COMPRESSIBLE = TEXT_SUFFIXES | RECORDS.keys() - PACKED
# The files that a folder is searched for. A file that is named, or matched by a glob, may have any suffix.
SUFFIXES = COMPRESSIBLE | PACKED | {text + packed for text in COMPRESSIBLE for packed in DECOMPRESSORS}
