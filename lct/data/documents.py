"""Documents from what is at hand: the standard library's sources, a folder, a glob, a .jsonl, a text file."""
import glob
import json
import os
import sysconfig
import tokenize
import zlib
from pathlib import Path
from typing import NamedTuple

# What a folder is searched for. A file that is named, or matched by a glob, may have any suffix.
TEXT_SUFFIXES = frozenset('.txt .text .md .rst .tex .html .xml .csv .py .pyi .ipynb .c .h .cc .cpp .hpp .cu '
                          '.rs .go .java .js .ts .rb .sh .sql .toml .yaml .yml .json .jsonl'.split())


class Document(NamedTuple):
    name: str
    text: str


def read(source=None, max_bytes=None):
    """-> [Document], in the order of their names; whole documents, at most max_bytes of UTF-8 in all.

    source: None or 'embedded' (the .py files of this interpreter's standard library: ten megabytes of real,
    long documents without a download), a folder (its text files, recursively), a glob, a .jsonl (field
    'text'), a text file. Documents without any text are left out.
    """
    documents, num_bytes = [], 0
    for document in _documents(source):
        size = len(document.text.encode('utf-8'))
        if max_bytes is not None and num_bytes + size > max_bytes:
            if not documents:
                raise ValueError(f'max_bytes {max_bytes} is less than the {size} bytes of the first document '
                                 f'{document.name}; use a larger max_bytes')
            break
        if size:
            documents.append(document)
            num_bytes += size
    if not documents:
        raise ValueError(f'the corpus {source} holds no text; a folder is searched for '
                         f'{" ".join(sorted(TEXT_SUFFIXES))}, so name other files by a glob')
    return documents


def split(documents, held_out=0.1):
    """-> (training, held_out): by the crc32 of the name, so that a document stays on its side as others come.

    Each side gets at least one document, whatever the hashes say. A held-out document whose text is also that
    of a training document is dropped: it would be no new text.
    """
    if not 0 <= held_out < 1:
        raise ValueError(f'held_out {held_out} is not a fraction in [0, 1); use for example 0.1')
    if held_out == 0:
        return list(documents), []
    if len(documents) < 2:
        raise ValueError(f'{len(documents)} document cannot be split into training and held-out documents; '
                         'give two or more, or use held_out=0')
    hashes = [zlib.crc32(document.name.encode()) / 2**32 for document in documents]
    threshold = min(max(held_out, min(hashes) + 2**-40), max(hashes))
    if min(hashes) == max(hashes):
        raise ValueError(f'all {len(documents)} documents are named {documents[0].name!r}; '
                         'give them different names')
    training = [document for document, value in zip(documents, hashes, strict=True) if value >= threshold]
    trained = {document.text for document in training}
    held = [document for document, value in zip(documents, hashes, strict=True)
            if value < threshold and document.text not in trained]
    if not held:
        raise ValueError('every held-out document repeats the text of a training document; '
                         'remove the copies from the corpus or use a larger held_out')
    return training, held


def _documents(source):
    if source is None or str(source) == 'embedded':
        yield from _standard_library()
        return
    path = Path(source)
    if path.is_dir():
        for file in sorted(path.rglob('*')):
            name = file.relative_to(path).as_posix()
            hidden = any(part.startswith('.') for part in name.split('/'))
            if file.is_file() and file.suffix.lower() in TEXT_SUFFIXES and not hidden:
                yield from _file(file, name)
    elif path.is_file():
        yield from _file(path, path.name)
    else:
        files = sorted(file for file in glob.glob(str(source), recursive=True) if Path(file).is_file())
        if not files:
            raise FileNotFoundError(f"corpus {source} does not exist and matches no file; give a folder, "
                                    "a glob, a .jsonl, a text file, or 'embedded'")
        # Names count from the part of the pattern that is no pattern: they, and so the split, do not
        # depend on where the corpus is mounted.
        fixed = next(parent for parent in path.parents if not glob.has_magic(str(parent)))
        for file in files:
            yield from _file(Path(file), Path(file).relative_to(fixed).as_posix())


def _file(path, name):
    try:
        text = path.read_text(encoding='utf-8-sig')
    except UnicodeDecodeError as error:
        raise ValueError(f'{path} is not UTF-8 text (byte {error.start}); '
                         'convert it or leave it out') from error
    if path.suffix.lower() != '.jsonl':
        yield Document(name, text)
        return
    for number, line in enumerate(text.split('\n'), 1):
        if line.strip():
            yield Document(f'{name}:{number}', _jsonl_text(path, number, line))


def _jsonl_text(path, number, line):
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f'{path} line {number} is not valid JSON ({error}); correct or remove it') from error
    if not isinstance(record, dict) or not isinstance(record.get('text'), str):
        raise ValueError(f"{path} line {number} is not an object with a string field 'text'; "
                         'correct or remove it')
    try:
        record['text'].encode('utf-8')
    except UnicodeEncodeError as error:
        raise ValueError(f'{path} line {number} has half a surrogate pair at character {error.start}, '
                         'which is no text; correct or remove it') from error
    return record['text']


def _standard_library():
    root = Path(sysconfig.get_paths()['stdlib'])
    not_text = {'site-packages', 'dist-packages', 'test', 'tests', 'idle_test', 'encodings'}
    files = []
    for folder, inner, names in os.walk(root):
        # Packages that users installed, test data, tables of code points and build settings are no prose.
        inner[:] = [name for name in inner if name not in not_text and not name.startswith('config-')]
        files += [Path(folder, name) for name in names
                  if name.endswith('.py') and not name.startswith('_sysconfigdata')]
    for file in sorted(files):
        with tokenize.open(file) as stream:  # a few sources declare an encoding of their own
            yield Document(file.relative_to(root).as_posix(), stream.read())
