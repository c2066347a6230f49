"""Documents from what is at hand: the standard library's sources, a folder, a glob, a .jsonl, a text file."""
import os
import sysconfig
import tokenize
import zlib
from pathlib import Path
from typing import NamedTuple

from lct.data.corpus.files import TEXT_SUFFIXES, find, record_of, text_of


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
    for file in find(source, TEXT_SUFFIXES):
        yield from _file(Path(file.path), file.name)


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
            try:
                yield Document(f'{name}:{number}', text_of(record_of(line), 'text'))
            except ValueError as error:
                raise ValueError(f'{path} line {number} {error}; correct or remove it') from error


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
