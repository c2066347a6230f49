"""Which files an answer names, and whether they are among those that were read."""

import posixpath
import re
from collections.abc import Sequence
from typing import NamedTuple

# A path or a file name with a suffix; 3.5 and e.g. are none.
FILE_NAME = re.compile(r'(?<![\w./-])(?:[\w.-]+/)*[\w-][\w.-]*\.[A-Za-z]\w{0,9}(?:#\d+|:\d+)?(?![\w/])')


class Citations(NamedTuple):
    """read: names of files that the answer names and that were read. unknown: names that no file has."""

    read: list[str]
    unknown: list[str]


def check(answer: str, names: Sequence[str]) -> Citations:
    """The Citations of an answer about files of these names. A file may be named by the end of its path."""
    read, unknown = [], []
    for match in FILE_NAME.finditer(answer):
        cited = match[0].rstrip('.')
        found = [name for name in names if name == cited or name.endswith('/' + cited)]
        if not found and not _is_probable(cited, names):
            continue
        for name in found or [cited]:
            group = read if found else unknown
            if name not in group:
                group.append(name)
    return Citations(read, unknown)


def _is_probable(cited, names):
    """Whether a word is meant as a file: it has a slash, or the suffix of one of the files. Others, such as
    module.function, are not."""
    suffixes = {posixpath.splitext(name)[1] for name in names}
    return '/' in cited or posixpath.splitext(cited)[1] in suffixes
