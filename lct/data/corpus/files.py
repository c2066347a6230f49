"""From the spec of a corpus to its documents: which files it names, and the documents in them.

find() gives the files, blocks() reads a file block by block, texts() gives the documents of a block. Memory
follows the longest document, not the size of the corpus. Reading is two functions because blocks() (bytes off
the disk, cut at line ends) is cheap and must run in order; texts() (JSON, Unicode) may run in any process.
"""

import codecs
import glob
import json
import os
import re
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from lct import bucket_cache
from lct.data.corpus import mail, notebooks
from lct.data.corpus.compression import DECOMPRESSORS, open_stream, optional

EMBEDDED = 'embedded'  # the spec of the standard library of this interpreter
TEXT_SUFFIXES = frozenset('.txt .text .md .rst .tex .html .xml .csv .py .pyi .c .h .cc .cpp .hpp .cu '
                          '.rs .go .java .js .ts .rb .sh .sql .toml .yaml .yml .json'.split())
BLOCK = 2**17  # bytes or characters; large enough that sending a block to another process costs nothing
PARQUET_ROWS = 64  # rows of a block
MAX_LINE = 2**28  # bytes of a line of JSON, which is in memory as a whole, several times
# Subfolders of the standard library that are not prose: installed packages, test data, tables of code points.
NOT_EMBEDDED = {'site-packages', 'dist-packages', 'test', 'tests', 'idle_test', 'encodings'}

# Splits the text that a stream of str amounts to: yields (segment, exact), see Tokenizer.split_stream.
Splitter = Callable[..., Iterable[tuple[str, bool]]]


class File(NamedTuple):
    source: str
    name: str
    path: str


class Text(NamedTuple):
    """A document, or a segment of one that is longer than a block.

    ends_document: whether the document ends here. error: why the document cannot be read; then text is ''.
    """
    name: str
    source: str
    text: str
    ends_document: bool = True
    error: str | None = None


class Block(NamedTuple):
    """A range of a file: a Text, lines of JSON (bytes), or rows of Parquet (dicts; None if not UTF-8).

    size: characters or bytes to tokenize. bytes_read: how far into the file it ends. first: number of its
    first line or row. exact: whether all token ids stay as they are although the text was cut at the end of
    this block.
    """
    file: File
    data: Text | bytes | list
    size: int
    bytes_read: int
    first: int = 1
    exact: bool = True


class Fields(NamedTuple):
    """The fields of a record that hold its text and, optionally, its source; 'a.b' is b of the object a."""
    text: str = 'text'
    source: str | None = None


FIELDS = Fields()


def find(spec: str | os.PathLike) -> Iterator[File]:
    """The Files of a corpus, in the order of their names, one at a time.

    spec: a folder (searched recursively for SUFFIXES; hidden entries are skipped, links to files are
      followed, links to folders are not), a glob, a single file, or 'embedded': the .py files of this
      interpreter's standard library, ten megabytes of long documents without a download. 'name=...' before
      any of them names the corpus.
    A File's name is relative to the folder, or to the fixed prefix of a glob: it does not depend on where a
    corpus is mounted. Its source is the first folder in that name, otherwise the folder searched, or the
    file. A name in spec becomes the source of all files and the first component of their names.

    Raises:
      FileNotFoundError: if spec matches no file.
    """
    given, path = _split_spec(str(spec))
    for source, name, file in _find(path):
        yield File(given or source, f'{given}/{name}' if given else name, os.fspath(file))


def no_text_error(spec: object) -> ValueError:
    """The error for a corpus without any text."""
    return ValueError(f'the corpus {spec} holds no text; a folder is searched for '
                      f'{" ".join(sorted(COMPRESSIBLE))}, these as {" or ".join(DECOMPRESSORS)}, and '
                      '.parquet; name other files by a glob')


def blocks(file: File, split: Splitter, fields: Fields = FIELDS) -> Iterator[Block]:
    """The Blocks of a File. Their order and sizes depend on its content alone.

    split: called with a stream of str and size=BLOCK, for a text file.

    Raises:
      ValueError: for a file that is truncated or damaged.
    """
    path = Path(file.path.lower())
    suffix = (path.with_suffix('') if path.suffix in DECOMPRESSORS else path).suffix
    try:
        if suffix in RECORDS:
            yield from RECORDS[suffix](file, fields)
        else:
            yield from _text_blocks(file, split)
    except (EOFError, zlib.error, OSError) as error:
        if getattr(error, 'errno', None) is not None:  # of the disk; errors of decompressors have no number
            raise
        raise ValueError(f'{file.path} is truncated or damaged ({error}); copy it again') from None


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
            text = _field(values, fields.text)
            if fields.source is not None:
                source = _field(values, fields.source)
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


def _field(record: Any, field: str) -> str:
    """The string in a field of a record. Raises ValueError with a predicate, as _parse does."""
    value = record
    for key in field.split('.'):
        value = value.get(key) if isinstance(value, dict) else None
    if not isinstance(value, str):
        raise ValueError(f'is not an object with a string field {field!r}')
    try:
        value.encode('utf-8')
    except UnicodeEncodeError as error:
        raise ValueError(f'has an unpaired surrogate at character {error.start}, which is not text') from None
    return value


def _split_spec(spec: str) -> tuple[str | None, str]:
    """(name or None, path) of 'name=path' or 'path'."""
    match = re.fullmatch(r'([\w.-]+)=(.+)', spec, re.DOTALL)
    return match.groups() if match and not os.path.exists(spec) else (None, spec)


def _find(path: str) -> Iterator[tuple[str, str, str | Path]]:
    """(source, name, path) of every file."""
    if not path:  # Path('') would be the current folder
        raise ValueError('the name of a corpus is empty; '
                         'give a folder, a glob, or a file of text, .jsonl or .parquet')
    if path == EMBEDDED:
        yield from ((EMBEDDED, name, file) for name, file in _standard_library())
        return
    path = Path(bucket_cache.local(path))
    if path.is_dir():
        folder_name = path.resolve().name
        for name, file in _walk(path, tuple(SUFFIXES)):
            yield name.split('/')[0] if '/' in name else folder_name, name, file
    elif path.is_file():
        yield path.name.split('.')[0], path.name, path
    else:
        yield from _find_matches(path)


def _find_matches(pattern: Path) -> Iterator[tuple[str, str, str]]:
    """(source, name, path) of every file that matches a glob."""
    files = sorted(filter(os.path.isfile, glob.glob(str(pattern), recursive=True)))
    if not files:
        raise FileNotFoundError(f'corpus {pattern} does not exist and matches no file; give a folder, a '
                                'glob, or a file of text, .jsonl or .parquet')
    fixed = next(parent for parent in pattern.parents if not glob.has_magic(str(parent)))
    for file in files:
        name = Path(file).relative_to(fixed).as_posix()
        yield name.split('/')[0] if '/' in name else fixed.resolve().name, name, file


def _standard_library() -> Iterator[tuple[str, Path]]:
    """(name, path) of the files of the standard library, sorted by the components of their names."""
    root = Path(sysconfig.get_paths()['stdlib'])
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders
                         if name not in NOT_EMBEDDED and not name.startswith('config-')]
        files += [Path(folder, name) for name in names
                  if name.endswith('.py') and not name.startswith('_sysconfigdata')]
    for file in sorted(files):
        yield file.relative_to(root).as_posix(), file


def _walk(folder: str | Path, suffixes: tuple[str, ...], prefix: str = '') -> Iterator[tuple[str, str]]:
    """(name, path) of the files in a folder, sorted by the components of their names."""
    with os.scandir(folder) as entries:
        entries = sorted((entry for entry in entries if not entry.name.startswith('.')), key=lambda x: x.name)
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):  # links may form a loop
            yield from _walk(entry.path, suffixes, f'{prefix}{entry.name}/')
        elif entry.is_file() and entry.name.lower().endswith(suffixes):
            yield prefix + entry.name, entry.path


def _text_blocks(file: File, split: Splitter) -> Iterator[Block]:
    # Read twice: an error after the first block would be found when the beginning is already tokenized.
    with open(file.path, 'rb') as raw, open_stream(raw, file.path) as stream:
        if (error := _utf8_error(stream, file.path)) is not None:
            yield Block(file, Text(file.name, file.source, '', error=error), 0, raw.tell())
            return
    with open(file.path, 'rb') as raw, open_stream(raw, file.path) as stream:
        decoder = codecs.getincrementaldecoder('utf-8-sig')()
        segments = iter(split((decoder.decode(data, final=not data) for data in _reads(stream)), size=BLOCK))
        segment, exact = next(segments)
        for following in segments:
            text = Text(file.name, file.source, segment, ends_document=False)
            yield Block(file, text, len(segment), raw.tell(), exact=exact)
            segment, exact = following
        yield Block(file, Text(file.name, file.source, segment), len(segment), raw.tell())


def _reads(stream: IO[bytes]) -> Iterator[bytes]:
    """The content of a stream, BLOCK bytes at a time, and then b''."""
    while data := stream.read(BLOCK):
        yield data
    yield b''


def _utf8_error(stream: IO[bytes], path: str) -> str | None:
    """A sentence about the first byte that is not UTF-8, or None."""
    decoder = codecs.getincrementaldecoder('utf-8')()
    size, line = 0, 1
    for data in _reads(stream):
        pending = len(decoder.getstate()[0])  # the first bytes of a character that ends in data
        try:
            decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            line += error.object[:error.start].count(b'\n')
            return (f'{path} line {line} is not UTF-8 text (byte {size - pending + error.start} of the '
                    'file); convert it or leave it out')
        size, line = size + len(data), line + data.count(b'\n')
    return None


def _line_blocks(file: File, _fields: Fields) -> Iterator[Block]:
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


def _parquet_blocks(file: File, fields: Fields) -> Iterator[Block]:
    parquet = optional('pyarrow.parquet', file.path)
    try:
        table = parquet.ParquetFile(file.path, pre_buffer=False, buffer_size=BLOCK)
    except ValueError as error:
        raise ValueError(f'{file.path} is not a complete Parquet file ({error}); copy it again') from None
    with table:
        columns = [field for field in fields if field is not None]
        missing = [field for field in columns if field.split('.')[0] not in table.schema_arrow.names]
        if missing:
            raise ValueError(f'{file.path} has no column {missing[0]!r}, only '
                             f'{", ".join(table.schema_arrow.names)}; name the column that holds the text, '
                             'or leave the file out')
        size, number = os.path.getsize(file.path), 0
        for batch in table.iter_batches(PARQUET_ROWS, columns=columns, use_threads=False):
            bytes_read = size * (number + len(batch)) // table.metadata.num_rows
            yield Block(file, _rows(batch), batch.nbytes, bytes_read, first=number)
            number += len(batch)


def _rows(batch) -> list[dict | None]:
    """The rows of a pyarrow.RecordBatch, None for a row that is not UTF-8."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        if len(batch) == 1:
            return [None]
        return [row for i in range(len(batch)) for row in _rows(batch.slice(i, 1))]


def _decoded_blocks(file: File, _fields: Fields) -> Iterator[Block]:
    """The messages of mail, or the cells of a notebook."""
    base = os.path.basename(file.path).lower()
    is_mbox, decode = '.mbox' in base, notebooks.notebook_text if '.ipynb' in base else mail.message_text
    with open(file.path, 'rb') as raw, open_stream(raw, file.path) as stream:
        for number, content in enumerate(mail.messages(stream) if is_mbox else [stream.read()], 1):
            name = f'{file.name}:{number}' if is_mbox else file.name
            try:
                text = Text(name, file.source, decode(content))
            except ValueError as error:
                text = Text(name, file.source, '', error=f'{file.path} {error}; correct or remove it')
            yield Block(file, text, len(text.text), raw.tell(), number)


# To add a format of records: its function, and its row here. Any other file is one text.
RECORDS = {'.jsonl': _line_blocks, '.parquet': _parquet_blocks, '.eml': _decoded_blocks,
           '.mbox': _decoded_blocks, '.ipynb': _decoded_blocks}
COMPRESSIBLE = TEXT_SUFFIXES | RECORDS.keys() - {'.parquet'}  # Parquet compresses by itself
# The files that a folder is searched for. A file that is named, or matched by a glob, may have any suffix.
SUFFIXES = COMPRESSIBLE | {'.parquet'} | {text + packed for text in COMPRESSIBLE for packed in DECOMPRESSORS}
