"""What the readers of corpus files give: files, blocks of files, texts."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

BLOCK = 2**17  # bytes or characters; large enough that sending a block to another process costs nothing
MAX_LINE = 2**28  # bytes of a line of JSON, which is in memory as a whole, several times
ROWS = 64  # rows of a block

# Splits the text that a stream of str amounts to: yields (segment, exact), see Tokenizer.split_stream.
Splitter = Callable[..., Iterable[tuple[str, bool]]]


class File(NamedTuple):
    """A file of a corpus.

    kind: the suffix of its format where the name does not end in it, such as '.mbox'.
    """
    source: str
    name: str
    path: str
    kind: str = ''


class Text(NamedTuple):
    """A document, or a segment of one that is longer than a block.

    ends_document: whether the document ends here. error: why the document cannot be read; then text is ''.
    latin1: whether its file is Latin-1 and not UTF-8.
    """
    name: str
    source: str
    text: str
    ends_document: bool = True
    error: str | None = None
    latin1: bool = False


class Block(NamedTuple):
    """A range of a file: a Text, lines of JSON (bytes), or rows (dicts; None if not UTF-8).

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


def field_of(record: Any, field: str) -> str:
    """The string in a field of a record. Raises ValueError with a predicate, which names the fields that
    there are."""
    value = record
    for key in field.split('.'):
        value = value.get(key) if isinstance(value, dict) else None
    if not isinstance(value, str):
        strings = [key for key, one in record.items() if isinstance(one, str)] if isinstance(
            record, dict) else []
        others = f' (its strings are {", ".join(map(repr, strings[:5]))})' if strings else ''
        raise ValueError(f'is not an object with a string field {field!r}{others}')
    try:
        value.encode('utf-8')
    except UnicodeEncodeError as error:
        raise ValueError(f'has an unpaired surrogate at character {error.start}, which is not text') from None
    return value
