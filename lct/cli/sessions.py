"""Sessions on disk by name: where they are, what they belong to, and how much room they take."""

import argparse
import hashlib
import os
import re
import shutil
import sys
import time
from collections.abc import Collection, Sequence
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


def check_holds_texts(folder: Path) -> None:
    """Refuse a folder for the texts of evaluations that holds anything but folders of sessions."""
    from lct.weights import saved_session

    if (folder / saved_session.INDEX).exists():
        raise saved_session.ForeignSession(f'session {folder} holds the one text of ask.py, and evaluations '
                                           'keep several; use another name')
    if folder.exists() and not folder.is_dir():
        raise saved_session.ForeignSession(f'session {folder} is a file; name a folder')
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if not path.is_dir():
            raise saved_session.ForeignSession(f'{folder} holds {path.name} and is not for sessions; name a '
                                               'new or an empty folder')
        saved_session.check_is_ours(path)


def entries(parent: Path | None = None) -> list[Entry]:
    """The sessions in a folder, by default those that have a name, the last used first. An evaluation keeps
    several under one name: NAME/TEXT."""
    from lct.weights import saved_session

    found, parent = [], parent or root()
    places = [f'{depth}/{saved_session.INDEX}' for depth in ('*', '*/*')]
    for index in sorted(path for place in places for path in parent.glob(place)):
        folder = index.parent
        size = sum(path.stat().st_size for path in folder.iterdir())
        try:
            facts = saved_session.describe(folder)
            tokens, name = facts['tokens'], str(facts['about'].get('model', ''))
        except saved_session.DamagedSession:
            tokens, name = 0, 'damaged'
        used, place = index.stat().st_mtime, str(folder.relative_to(parent))
        found.append(Entry(place, folder, tokens, size, used, name))
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


def delete(name: str, parent: Path | None = None) -> None:
    """Delete a session in a folder, by default one that has a name, and nothing but sessions."""
    from lct.weights import saved_session

    parent = parent or root()
    folder, parts = parent / name, name.split('/')
    if len(parts) > 2 or not all(map(NAME.fullmatch, parts)) or not folder.is_dir():
        raise ValueError(f'there is no session {name!r} in {parent}; --sessions lists them')
    if (folder / saved_session.INDEX).exists() or len(parts) == 2:
        saved_session.check_is_ours(folder)
    else:
        check_holds_texts(folder)
    shutil.rmtree(folder)


def prune(max_bytes: float, keep: Collection[Path] = (), parent: Path | None = None) -> list[str]:
    """Delete the sessions in a folder, by default those that have a name, that were unused for longest, until
    all of them take at most max_bytes -> their names."""
    found, removed = entries(parent), []
    total = sum(one.bytes for one in found)
    for one in reversed(found):
        if total <= max_bytes:
            break
        if one.folder in keep:
            continue
        try:
            delete(one.name, parent)
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


def folder_of_flags(args: argparse.Namespace) -> Path | None:
    """The folder of --session. Checks --session-gb."""
    if not args.session_gb > 0:
        raise ValueError(f'--session-gb {args.session_gb} must be above 0')
    return args.session and folder_of(args.session)


def keep_within(gigabytes: float, keep: Collection[Path], parent: Path | None = None) -> None:
    """Delete sessions beyond so much disk space, as prune, but not those that are in use."""
    for name in prune(gigabytes * 1e9, keep, parent):
        status('session', f'deleted {name}, unused for longest, to keep all within {gigabytes:g} GB')
