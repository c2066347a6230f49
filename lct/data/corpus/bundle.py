"""Many files as one text: each under a line with its path, in the order of the paths."""

import os
from collections.abc import Sequence

from lct.data.corpus import documents
from lct.data.corpus.documents import Document
from lct.data.tokenizer import Tokenizer

HEADER = '======== {name} ========\n'
NUM_NAMED = 5  # files that an error names


def read(sources: Sequence[str | os.PathLike]) -> list[Document]:
    """Documents of several folders, globs or files (see documents.read), in the order of their names.

    Raises:
      ValueError: if two files have the same name.
    """
    found = [document for source in sources for document in documents.read(source)]
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


def check_fits(files: Sequence[Document], tokenizer: Tokenizer, needed: int, length: int) -> None:
    """Refuse files that need more than `length` tokens; the error names the largest.

    needed: tokens of the whole prompt and of the answer.
    """
    if needed <= length:
        return
    sizes = sorted(zip(map(len, tokenizer.encode_batch([section(one) for one in files])),
                       [one.name for one in files], strict=True), reverse=True)
    largest = ', '.join(f'{name} ({size:,})' for size, name in sizes[:NUM_NAMED])
    raise ValueError(f'{len(files)} files with question and answer take {needed:,} tokens, '
                     f'{needed - length:,} more than the {length:,} that the model may read; the largest are '
                     f'{largest}: leave some out, allow fewer new tokens, or use a longer context')
