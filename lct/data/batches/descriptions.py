"""Training rows as dicts for JSON: what is needed to draw or read a row again."""

from collections.abc import Sequence
from typing import Any, NamedTuple

MAX_DOCUMENTS = 64  # listed of a row, which may hold thousands


class Extent(NamedTuple):
    """A range of tokens of a document; start counts the document's bos, if it has one."""
    document: str | int
    start: int
    tokens: int


def describe_row(number: int, kind: str, seed: int, extents: Sequence[Extent]) -> dict[str, Any]:
    """Row `number` of a stream. kind and seed are what its random choices follow from; extents: its text."""
    row = {'row': int(number), 'kind': kind, 'seed': int(seed)}
    if extents:
        row['documents'] = [
            {'document': one.document if isinstance(one.document, str) else int(one.document),
             'start': int(one.start), 'tokens': int(one.tokens)} for one in extents[:MAX_DOCUMENTS]]
    if len(extents) > MAX_DOCUMENTS:
        row['more_documents'] = len(extents) - MAX_DOCUMENTS
    return row
