"""The documents of a corpus in memory, and their split into training and held-out documents."""

import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from lct.data.corpus.blocks import FIELDS, Fields, File, Text
from lct.data.corpus.files import blocks, texts
from lct.data.corpus.listing import EMBEDDED, Tally, find, no_text_error


class Document(NamedTuple):
    name: str
    text: str


def read(source: str | os.PathLike | None = None, max_bytes: int | None = None, fields: Fields = FIELDS,
         exclude: Sequence[str] = (), tally: Tally | None = None) -> list[Document]:
    """Whole documents in the order of their names, at most max_bytes of UTF-8 in total.

    source, exclude: see listing.find; None is 'embedded'. Documents without text are left out.
    tally: counts what was read and what was not.

    Raises:
      ValueError: for a document that cannot be read, naming file and line; for a corpus without text; if
        max_bytes is less than the first document.
    """
    source, tally = EMBEDDED if source is None else source, tally or Tally()
    documents, num_bytes, files = [], 0, find(source, exclude, tally)
    for file in files:
        before = len(documents)
        for text in _texts(file, fields):
            size = len(text.text.encode('utf-8'))
            if max_bytes is not None and num_bytes + size > max_bytes:
                if not documents:
                    raise ValueError(f'max_bytes {max_bytes} is less than the {size} bytes of the first '
                                     f'document {text.name}; use a larger max_bytes')
                tally.left = 1 + sum(1 for _ in files)
                break
            if size:
                documents.append(Document(text.name, text.text))
                num_bytes += size
                tally.latin1 += text.latin1
        tally.files += len(documents) > before
        if tally.left:
            break
        if len(documents) == before:
            tally.skipped['empty'] += 1
    tally.documents += len(documents)
    if not documents:
        raise no_text_error(source, tally)
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


def _texts(file: File, fields: Fields) -> Iterator[Text]:
    for block in blocks(file, _unsplit, fields):
        for text in texts(block, fields):
            if text.error is not None:
                raise ValueError(text.error)
            yield text


def _unsplit(stream: Iterable[str], size: int) -> Iterator[tuple[str, bool]]:
    """The splitter that leaves a text file whole."""
    yield ''.join(stream), True
