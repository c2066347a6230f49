"""The texts that were read for earlier requests, on disk, so that a server that starts again need not read
them again. They are sessions like those of ask.py, which are continued too, but never overwritten."""

import os
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lct.models.prompt_layout import common_prefix
from lct.models.session import Session
from lct.weights import saved_session, session_writer
from lct.weights.saved_session import DamagedSession, ForeignSession, SavedSession

PREFIX = 'served-'  # of the names of the folders


class DiskTexts:
    """Saved sessions of one model in the folders of a folder.

    probe: a Session with the settings of all others. facts: what identifies the model, as in saved_session.
    about: what a session says of itself. prune: called with the folder of a new session, to delete others
    beyond a bound.
    """

    def __init__(self, folder: str | os.PathLike, probe: Session, facts: Mapping[str, Any],
                 about: Mapping[str, Any], prune: Callable[[Path], None]):
        self._folder, self._probe, self._facts = Path(folder), probe, facts
        self._about, self._prune = about, prune
        self._saved: dict[Path, SavedSession] = {}
        for path in sorted(self._folder.iterdir()) if self._folder.is_dir() else []:
            self._look(path)

    def __iter__(self):
        return iter(list(self._saved.values()))

    def get(self, folder: Path | None) -> SavedSession | None:
        return self._saved.get(folder)

    def best(self, ids: Sequence[int]) -> tuple[SavedSession | None, int]:
        """The text that shares most with token ids -> (it, tokens shared)."""
        found = [(common_prefix(one.ids, ids), i) for i, one in enumerate(self)]
        shared, i = max(found, default=(0, None))
        return None if i is None else list(self)[i], shared

    def own(self, saved: SavedSession) -> Path | None:
        """The folder of a text that may be overwritten, else None."""
        return saved.folder if saved.folder.name.startswith(PREFIX) else None

    def load(self, saved: SavedSession, session: Session, length: int) -> int:
        """Make the session hold the first `length` tokens of a text, or as many of them as are undamaged.
        Returns how many."""
        try:
            intact = saved.verify(length)
            if intact:
                saved_session.load(session, [(saved, intact)])
                os.utime(saved.folder / saved_session.INDEX)  # when it was used
        except (OSError, ValueError) as error:  # another process has replaced or deleted it
            print(f'WARNING: session {saved.folder} is read anew: {error}', file=sys.stderr, flush=True)
            intact = 0
        if intact < length:
            self._look(saved.folder)
        return intact

    def save(self, session: Session, folder: Path | None) -> Path:
        """Write the text of row 0, into a new folder for None. Returns the folder."""
        folder = folder or self._folder / f'{PREFIX}{secrets.token_hex(6)}'
        try:
            session_writer.save(folder, session, self._facts, about=self._about)
        finally:
            self._look(folder)
        self._prune(folder)
        self._saved = {path: one for path, one in self._saved.items() if path.exists()}
        return folder

    def _look(self, path):
        """Take note of what a folder holds by now, if it is a session of this model."""
        self._saved.pop(path, None)
        try:
            if (path / saved_session.INDEX).exists():
                self._saved[path] = saved_session.read(path, self._probe, self._facts)
        except (ForeignSession, DamagedSession, OSError):
            pass  # another model's, or of no use: nothing reads it, and a bound on the disk deletes it
