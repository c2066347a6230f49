"""Sessions on disk by name: where they are, what they belong to, and how much room they take."""

import argparse
import hashlib
import os
import re
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lct.cli.progress import status
from lct.files import user_cache

if TYPE_CHECKING:  # imported late, so that --help is fast
    from lct.eval.runner import Model
    from lct.models.session import Session

NAME = re.compile(r'[\w][\w.-]{0,100}')


class Entry(NamedTuple):
    """A session by name. tokens, bytes: 0 if it is damaged. used: seconds since the epoch."""

    name: str
    folder: Path
    tokens: int
    bytes: int
    used: float
    model: str


def root() -> Path:
    """The folder of the sessions that have a name."""
    return user_cache() / 'sessions'


def folder_of(name_or_folder: str) -> Path:
    """The folder of a session: NAME is one in the user's cache, anything with a slash a path."""
    if os.sep in name_or_folder:
        return Path(name_or_folder).expanduser()
    if not NAME.fullmatch(name_or_folder):
        raise ValueError(f'session {name_or_folder!r} is neither a name of letters, digits, ., _ and - nor a '
                         'path with a slash; use for example my-code or ./my-code')
    return root() / name_or_folder


def model_facts(model: 'Model', folder: str | Path) -> dict[str, Any]:
    """What identifies a model for its caches: all bytes of its weights (those in its manifest, which are
    compared when they are read, are not read again), its tokenizer and its template."""
    from lct.weights import manifest

    template = model.template
    return {'weights': manifest.file_totals(folder, ['.safetensors']),
            'tokenizer': model.tokenizer.fingerprint,
            'template': template and hashlib.sha256(template.source.encode()).hexdigest()}


def restore(session: 'Session', folder: Path, facts: dict[str, Any], ids: Sequence[int]) -> tuple[int, str]:
    """Load what a saved text and ids begin with.

    Returns:
      (tokens that the session now holds, '' or a sentence on why they are fewer than they could be).
    Raises:
      ForeignSession: as saved_session.read.
    """
    from lct.models.prompt_layout import common_prefix
    from lct.weights import saved_session

    try:
        saved = saved_session.read(folder, session, facts)
    except saved_session.DamagedSession as error:
        return 0, f'{error}; the text is read anew'
    if saved is None:
        return 0, ''
    common = common_prefix(saved.ids, ids)
    intact = saved.verify(common)
    problem = '' if intact == common else (
        f'session {folder} is damaged from token {intact:,} on (another crc32); the rest is read anew')
    if intact:
        saved_session.load(session, [(saved, intact)])
        os.utime(folder / saved_session.INDEX)  # when it was used
    return intact, problem


def entries() -> list[Entry]:
    """The sessions that have a name, the last used first."""
    from lct.weights import saved_session

    found = []
    for folder in sorted(root().iterdir()) if root().is_dir() else []:
        index = folder / saved_session.INDEX
        if not index.exists():
            continue
        size = sum(path.stat().st_size for path in folder.iterdir())
        try:
            facts = saved_session.describe(folder)
            tokens, name = facts['tokens'], str(facts['about'].get('model', ''))
        except saved_session.DamagedSession:
            tokens, name = 0, 'damaged'
        found.append(Entry(folder.name, folder, tokens, size, index.stat().st_mtime, name))
    return sorted(found, key=lambda entry: -entry.used)


def table() -> str:
    """The sessions that have a name as a table."""
    from lct import text

    found = entries()
    if not found:
        return f'no sessions in {root()}'
    days = lambda entry: f'{(time.time() - entry.used) / 86400:.1f}'
    rows = [(one.name, one.model, f'{one.tokens:,}', f'{one.bytes / 1e6:,.1f}', days(one)) for one in found]
    total = ('total', '', f'{sum(one.tokens for one in found):,}',
             f'{sum(one.bytes for one in found) / 1e6:,.1f}', '')
    header = 'session', 'model', 'tokens', 'MB', 'days unused'
    return text.table(header, [*rows, total], left=(0, 1), footer=1) + f'\n\nin {root()}'


def delete(name: str) -> None:
    """Delete a session that has a name, and nothing but a session."""
    from lct.weights import saved_session

    folder = root() / name
    if not NAME.fullmatch(name) or not folder.is_dir():
        raise ValueError(f'there is no session {name!r} in {root()}; --sessions lists them')
    saved_session.check_is_ours(folder)
    shutil.rmtree(folder)


def prune(max_bytes: float, keep: Sequence[Path] = ()) -> list[str]:
    """Delete the sessions unused for longest until all of them take at most max_bytes -> their names."""
    found, removed = entries(), []
    total = sum(one.bytes for one in found)
    for one in reversed(found):
        if total <= max_bytes:
            break
        if one.folder in keep:
            continue
        try:
            delete(one.name)
            removed.append(one.name)
        except (OSError, ValueError) as error:
            if one.folder.exists():  # it holds a file of another user; otherwise another process deleted it
                print(f'WARNING: session {one.name} cannot be deleted: {error}', file=sys.stderr)
                continue
        total -= one.bytes
    return removed


# ---------------------------------------------------------------------------------------------------
# Flags
# ---------------------------------------------------------------------------------------------------


def add_flags(parser: argparse.ArgumentParser) -> None:
    """--session, --session-gb, and those of manage for the help."""
    parser.add_argument('--session', metavar='NAME', help='keep the text that was read under this name, '
                        'or in this folder if it has a slash, and reuse it')
    parser.add_argument('--session-gb', type=float, default=20.0,
                        help='disk space of all named sessions; those unused for longest are deleted')
    parser.add_argument('--sessions', action='store_true', help='list the named sessions and their sizes')
    parser.add_argument('--delete-session', metavar='NAME', help='delete a named session')


def manage(arguments: Sequence[str]) -> bool:
    """List or delete sessions, if that is what the arguments of a script say."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument('--sessions', action='store_true')
    parser.add_argument('--delete-session')
    args, _ = parser.parse_known_args(arguments)
    if args.delete_session:
        delete(args.delete_session)
        print(f'deleted {args.delete_session}')
    if args.sessions:
        print(table())
    return bool(args.sessions or args.delete_session)


def keep_within(gigabytes: float, folder: Path) -> None:
    """Delete named sessions beyond so much disk space, but not the one in use in folder."""
    for name in prune(gigabytes * 1e9, [folder]):
        status('session', f'deleted {name}, unused for longest, to keep all within {gigabytes:g} GB')
