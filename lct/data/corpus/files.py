"""What a corpus is made of: the files of folders and globs, and their documents, read a block at a time, so that
memory follows the longest document of a record file and not the corpus.

blocks() is the cheap half of reading (bytes off the disk, decompressed and cut at line ends), texts() the dear
one (JSON, Unicode): two halves because the first must be in order and the second may run in any process.
"""

import codecs
import glob
import gzip
import importlib
import io
import json
import os
import re
import zlib
from pathlib import Path
from typing import NamedTuple

# What a folder is searched for. A file that is named, or matched by a glob, may have any suffix.
TEXT_SUFFIXES = frozenset('.txt .text .md .rst .tex .html .xml .csv .py .pyi .ipynb .c .h .cc .cpp .hpp .cu '
                          '.rs .go .java .js .ts .rb .sh .sql .toml .yaml .yml .json .jsonl'.split())
COMPRESSED = ('.gz', '.zst')
SUFFIXES = TEXT_SUFFIXES | {'.parquet'} | {text + packed for text in TEXT_SUFFIXES for packed in COMPRESSED}
BLOCK = 2**17  # bytes or characters; long enough that handing it to another process costs nothing
ROWS = 64  # of Parquet in a block


class File(NamedTuple):
    source: str
    name: str
    path: str


class Text(NamedTuple):
    """A document, or where ends is False a piece of one; bad says what is wrong with it, and then text is ''."""
    name: str
    source: str
    text: str
    ends: bool = True
    bad: str | None = None


class Block(NamedTuple):
    """A part of a file: a Text, whole lines of JSON (bytes), or rows of Parquet (list of dict, None for a row that is
    not UTF-8).

    size: how much there is to tokenize, in characters or bytes. read: bytes of the file read so far. first: number of
    the first line or row. exact: whether the cut at the end of a piece of text leaves all ids as they are.
    """
    file: File
    data: Text | bytes | list
    size: int
    read: int
    first: int = 1
    exact: bool = True


class Fields(NamedTuple):
    """Where a record holds its text and, if it does, the name of its source; 'a.b' is b of the object a."""
    text: str = 'text'
    source: str | None = None


FIELDS = Fields()


def find(spec, suffixes=SUFFIXES):
    """The Files of a folder (recursively; hidden ones and other suffixes left out), a glob or a single file, in the
    order of their names, without holding them all.

    spec: the path, or 'name=path'. A File's name is relative to the folder, or to the part of a glob that is no
    pattern: it does not depend on where a corpus is mounted. Its source is the first folder in that name, else
    the folder searched, or the file. A name in spec is the source of all, and the first part of their names.

    Raises:
      FileNotFoundError: if there is no such file.
    """
    given, path = _named(str(spec))
    for source, name, file in _find(path, suffixes):
        yield File(given or source, f'{given}/{name}' if given else name, os.fspath(file))


def blocks(file, pieces, fields=FIELDS):
    """The Blocks of a File, in an order and of sizes that depend on its content alone.

    pieces: cuts a stream of str into (piece, exact), see data.tokenizer.Tokenizer.split_stream.
    """
    kind = Path(file.path.lower().removesuffix('.gz').removesuffix('.zst')).suffix
    try:
        if kind == '.parquet':
            yield from _parquet_blocks(file, fields)
        elif kind == '.jsonl':
            yield from _line_blocks(file)
        else:
            yield from _text_blocks(file, pieces)
    except (EOFError, zlib.error, OSError) as error:
        if getattr(error, 'errno', None) is not None:  # the disk's; those of decompressors have no number
            raise
        raise ValueError(f'{file.path} is cut short or damaged ({error}); copy it again') from None


def texts(block, fields=FIELDS):
    """The Texts of a Block. Empty ones are among them, blank lines are not."""
    if isinstance(block.data, Text):
        yield block.data
        return
    lines = isinstance(block.data, bytes)
    for number, part in enumerate(block.data.split(b'\n') if lines else block.data, block.first):
        if lines and not part.strip():
            continue
        name, source = f'{block.file.name}:{number}', block.file.source
        try:
            if part is None:
                raise ValueError('is not UTF-8 text')
            record = record_of(part) if lines else part
            text = text_of(record, fields.text)
            if fields.source is not None:
                source = text_of(record, fields.source)
            yield Text(name, source, text)
        except ValueError as error:
            place = f'{block.file.path} {"line" if lines else "row"} {number}'
            yield Text(name, source, '', bad=f'{place} {error}; correct or remove it')


def record_of(line):
    """The JSON value of a line. Raises ValueError with a predicate: the caller knows whose."""
    try:
        return json.loads(line.decode('utf-8') if isinstance(line, bytes) else line)
    except UnicodeDecodeError as error:
        raise ValueError(f'is not UTF-8 text (byte {error.start} of the line)') from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f'is not valid JSON ({error})') from None


def text_of(record, field):
    """The string that a record holds at field. Raises ValueError with a predicate, as record_of."""
    value = record
    for part in field.split('.'):
        value = value.get(part) if isinstance(value, dict) else None
    if not isinstance(value, str):
        raise ValueError(f'is not an object with a string field {field!r}')
    try:
        value.encode('utf-8')
    except UnicodeEncodeError as error:
        raise ValueError(f'has half a surrogate pair at character {error.start}, which is no text') from None
    return value


def _named(spec):
    match = re.fullmatch(r'([\w.-]+)=(.+)', spec, re.DOTALL)
    return match.groups() if match and not os.path.exists(spec) else (None, spec)


def _find(path, suffixes):
    """(source, name, path) of every file."""
    if not path:  # Path('') would be the current folder
        raise ValueError('the name of a corpus is empty; give a folder, a glob, or a file of text, .jsonl or .parquet')
    path = Path(path)
    if path.is_dir():
        whole = path.resolve().name
        for name, file in _walk(path, tuple(suffixes)):
            yield name.split('/')[0] if '/' in name else whole, name, file
    elif path.is_file():
        yield path.name.split('.')[0], path.name, path
    else:
        files = sorted(file for file in glob.glob(str(path), recursive=True) if os.path.isfile(file))
        if not files:
            raise FileNotFoundError(f"corpus {path} does not exist and matches no file; give a folder, a glob, or a "
                                    'file of text, .jsonl or .parquet')
        fixed = next(parent for parent in path.parents if not glob.has_magic(str(parent)))
        for file in files:
            name = Path(file).relative_to(fixed).as_posix()
            yield name.split('/')[0] if '/' in name else fixed.resolve().name, name, file


def _walk(folder, suffixes, prefix=''):
    """(name, path) of the files in a folder, sorted by the parts of their names."""
    with os.scandir(folder) as entries:
        entries = sorted((entry for entry in entries if not entry.name.startswith('.')), key=lambda x: x.name)
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(entry.path, suffixes, f'{prefix}{entry.name}/')
        elif entry.is_file() and entry.name.lower().endswith(suffixes):
            yield prefix + entry.name, entry.path


def _open(raw, path):
    """The decompressed stream of a file; its read(n) gives n bytes unless the file ends."""
    if path.lower().endswith('.gz'):
        return gzip.GzipFile(fileobj=raw)
    if path.lower().endswith('.zst'):
        return io.BufferedReader(_optional('pyarrow', path).CompressedInputStream(raw, 'zstd'), BLOCK)
    return raw


def _optional(name, path):
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(f"{path} is read with the package {name.split('.')[0]}; pip install '.[corpus]'") from None


def _text_blocks(file, pieces):
    # Read twice: an error behind the first block would be found when the beginning is already tokenized.
    with open(file.path, 'rb') as raw, _open(raw, file.path) as stream:
        bad = _not_utf8(stream, file.path)
        if bad is not None:
            yield Block(file, Text(file.name, file.source, '', bad=bad), 0, raw.tell())
            return
    with open(file.path, 'rb') as raw, _open(raw, file.path) as stream:
        decoder = codecs.getincrementaldecoder('utf-8-sig')()
        cut = pieces((decoder.decode(data, final=not data) for data in _chunks(stream)), size=BLOCK)
        piece, exact = next(cut)
        for following in cut:
            yield Block(file, Text(file.name, file.source, piece, False), len(piece), raw.tell(), exact=exact)
            piece, exact = following
        yield Block(file, Text(file.name, file.source, piece), len(piece), raw.tell())


def _chunks(stream):
    """What a stream holds, BLOCK bytes at a time, the last one empty."""
    while data := stream.read(BLOCK):
        yield data
    yield b''


def _not_utf8(stream, path):
    """A sentence about the first byte that is not UTF-8, or None."""
    decoder = codecs.getincrementaldecoder('utf-8')()
    size, lines = 0, 1
    for data in _chunks(stream):
        kept = len(decoder.getstate()[0])  # the first bytes of a character whose others are in data
        try:
            decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            line = lines + error.object[:error.start].count(b'\n')
            return (f'{path} line {line} is not UTF-8 text (byte {size - kept + error.start} of the file); convert it '
                    'or leave it out')
        size, lines = size + len(data), lines + data.count(b'\n')
    return None


def _line_blocks(file):
    with open(file.path, 'rb') as raw, _open(raw, file.path) as stream:
        begun, number = [], 1  # a line may be longer than many chunks
        for data in _chunks(stream):
            if number == 1 and not begun:
                data = data.removeprefix(codecs.BOM_UTF8)
            end = data.rfind(b'\n') + 1 if data else 0
            if data and not end:
                begun.append(data)
                continue
            lines = b''.join([*begun, data[:end]])
            begun = [data[end:]]
            if lines:
                yield Block(file, lines, len(lines), raw.tell(), first=number)
            number += lines.count(b'\n')


def _parquet_blocks(file, fields):
    parquet = _optional('pyarrow.parquet', file.path)
    try:
        table = parquet.ParquetFile(file.path, pre_buffer=False, buffer_size=BLOCK)
    except ValueError as error:
        raise ValueError(f'{file.path} is no whole Parquet file ({error}); copy it again') from None
    with table:
        columns = [field for field in fields if field is not None]
        missing = [field for field in columns if field.split('.')[0] not in table.schema_arrow.names]
        if missing:
            raise ValueError(f'{file.path} has no column {missing[0]!r}, only {", ".join(table.schema_arrow.names)}; '
                             'name the one that holds the text')
        size, number = os.path.getsize(file.path), 0
        for batch in table.iter_batches(ROWS, columns=columns, use_threads=False):
            read = size * (number + len(batch)) // table.metadata.num_rows
            yield Block(file, _rows(batch), batch.nbytes, read, first=number)
            number += len(batch)


def _rows(batch):
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        if len(batch) == 1:
            return [None]
        return [row for i in range(len(batch)) for row in _rows(batch.slice(i, 1))]
