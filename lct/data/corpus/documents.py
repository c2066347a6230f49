"""The documents of a corpus in memory, and their split into training and held-out documents."""

import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from lct.data.corpus.files import EMBEDDED, FIELDS, Fields, blocks, find, no_text_error, texts


class Document(NamedTuple):
    name: str
    text: str


def read(source: str | os.PathLike | None = None, max_bytes: int | None = None,
         fields: Fields = FIELDS) -> list[Document]:
    """Whole documents in the order of their names, at most max_bytes of UTF-8 in total.

    source: see files.find; None is 'embedded'. Documents without text are left out.

    Raises:
      ValueError: for a document that cannot be read, naming file and line; for a corpus without text; if
        max_bytes is less than the first document.
    """
    documents, num_bytes = [], 0
    for document in _documents(EMBEDDED if source is None else source, fields):
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
        raise no_text_error(source)
    return documents


def split(documents: Sequence[Document], held_out: float = 0.1) -> tuple[list[Document], list[Document]]:
    """(training, held-out) documents, chosen by the crc32 of the name.

    A document stays on its side as others are added. Each side gets at least one document, whatever the
    hashes are. A held-out document whose text is also the text of a training document is dropped, since it is
    not new to the model.
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
    training_texts = {document.text for document in training}
    held = [document for document, value in zip(documents, hashes, strict=True)
            if value < threshold and document.text not in training_texts]
    if not held:
        raise ValueError('every held-out document repeats the text of a training document; '
                         'remove the copies from the corpus or use a larger held_out')
    return training, held


def _documents(source: str | os.PathLike, fields: Fields) -> Iterator[Document]:
    for file in find(source):
        for block in blocks(file, _unsplit, fields):
            for text in texts(block, fields):
                if text.error is not None:
                    raise ValueError(text.error)
                yield Document(text.name, text.text)


def _unsplit(stream: Iterable[str], size: int) -> Iterator[tuple[str, bool]]:
    """The splitter that leaves a text file whole."""
    yield ''.join(stream), True
