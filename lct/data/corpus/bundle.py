"""Many files as one text: each under a line with its path, in the order of the paths."""

import os
from collections.abc import Sequence

from lct.data.corpus import documents
from lct.data.corpus.documents import Document
from lct.data.corpus.listing import Tally
from lct.data.tokenizer import Tokenizer

HEADER = '======== {name} ========\n'
NUM_NAMED = 5  # files that an error names
SAMPLES, SAMPLE = 32, 1024  # files, and characters of each, from which the number of tokens is estimated
CERTAIN = 2.0  # an estimate this many times too large refuses the files, a lower one has them counted


def read(sources: Sequence[str | os.PathLike], exclude: Sequence[str] = (),
         tally: Tally | None = None) -> list[Document]:
    """Documents of several folders, globs or files (see documents.read), in the order of their names.

    exclude, tally: see listing.find.

    Raises:
      ValueError: if two files have the same name.
    """
    found = [document for source in sources
             for document in documents.read(source, exclude=exclude, tally=tally)]
    names = [document.name for document in found]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f'{len(repeated)} of {len(names)} files have a name that another file has too, the '
                         f"first is {repeated[0]!r}; give one folder or glob, such as 'repo/**/*.py', so "
                         'that their names differ')
    return sorted(found, key=lambda document: document.name)


def section(document: Document) -> str:
    """A file in the text: its header and its lines, with a newline at the end."""
    return HEADER.format(name=document.name) + document.text + '\n' * (not document.text.endswith('\n'))


def text(files: Sequence[Document]) -> str:
    """The sections of all files."""
    return ''.join(map(section, files))


def check_estimate(files: Sequence[Document], tokenizer: Tokenizer, length: int) -> None:
    """Refuse files of far more than `length` tokens, as estimated from samples, before all are encoded."""
    size = sum(len(one.text) for one in files)
    step = max(1, -(-len(files) // SAMPLES))
    samples = [_middle(one.text) for one in files[::step]]
    tokens_per_character = sum(map(len, tokenizer.encode_batch(samples))) / max(sum(map(len, samples)), 1)
    estimate = int(size * tokens_per_character)
    if estimate > CERTAIN * length:
        sizes = {one.name: int(len(one.text) * tokens_per_character) for one in files}
        raise _too_long(sizes, estimate, length, 'about ')


def _middle(text):
    """At most SAMPLE characters: the beginning of a file is often a license."""
    start = max(len(text) - SAMPLE, 0) // 2
    return text[start:start + SAMPLE]


def check_fits(files: Sequence[Document], tokenizer: Tokenizer, needed: int, length: int) -> None:
    """Refuse files that need more than `length` tokens; the error names the largest.

    needed: tokens of the whole prompt and of the answer.
    """
    if needed > length:
        encoded = tokenizer.encode_batch([section(one) for one in files])
        sizes = {one.name: len(ids) for one, ids in zip(files, encoded, strict=True)}
        raise _too_long(sizes, needed, length)


def _too_long(sizes, needed, length, about=''):
    """The error for files {name: tokens}."""
    descending = sorted(sizes.items(), key=lambda one: (-one[1], one[0]))
    largest = ', '.join(f'{name} ({about}{size:,})' for name, size in descending[:NUM_NAMED])
    return ValueError(f'{len(sizes)} files with question and answer take {about}{needed:,} tokens, '
                      f'{about}{needed - length:,} more than the {length:,} that the model may read; '
                      f'the largest are {largest}: leave some out, allow fewer new tokens, or use a longer '
                      'context')
