"""The files of a tokenizer, which may come from anyone: read strictly, with one sentence for an error."""

import base64
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lct import files, json_files

MAX_BYTES = 200_000_000  # of the largest published ones 35 MB


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object of tokenizer.json or of a file next to it. Raises ValueError as json_files does."""
    return json_files.read_json(path, MAX_BYTES)


def read_bytes(path: Path) -> bytes:
    """The content of a file. Raises ValueError for one that is too large for a tokenizer."""
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f'{path} has {path.stat().st_size:,} bytes, too many for a tokenizer (at most '
                         f'{MAX_BYTES:,}); copy it again')
    files.refuse_lfs_pointer(path)
    return path.read_bytes()


@contextlib.contextmanager
def library_errors(path: Path, failure: str) -> Iterator[None]:
    """Around calls of a library in Rust: its exceptions and panics become a ValueError about the file.

    failure: completes '{path} {failure}'.
    """
    try:
        yield
    except BaseException as error:  # a panic is not an Exception, and its class cannot be imported
        if not isinstance(error, Exception) and type(error).__name__ != 'PanicException':
            raise
        message = ' '.join(str(error).split())
        raise ValueError(f"{path} {failure} ({message[:300]}); give the tokenizer of the model's "
                         "publisher, or 'bytes'") from None


def read_mergeable_ranks(path: Path, content: bytes) -> dict[bytes, int]:
    """{token bytes: rank} of the content of Meta's tokenizer.model at path.

    Raises:
      ValueError: if it is another file.
    """
    ranks = {}
    for number, line in enumerate(content.splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise ValueError(f"{path} line {number} is not 'base64 rank': this is not Meta's Llama-3 "
                             'tokenizer.model (perhaps a SentencePiece model); use the tokenizer.json of the '
                             'checkpoint') from None
    if not ranks or sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f'{path} holds {len(ranks)} tokens whose ranks are not '
                         f'0..{len(ranks) - 1}; fetch it again')
    return ranks
