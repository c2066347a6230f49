"""The texts in a folder of saved sessions, of which a text may continue the one that it shares most with.

They are what a server or an evaluation has read; those that other scripts have saved in the folder are
continued too, but never overwritten.
"""

import os
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lct.models.prompt_layout import common_prefix
from lct.models.session import Session
from lct.weights import saved_session, session_writer
from lct.weights.saved_session import DamagedSession, ForeignSession, SavedSession

PREFIX = 'served-'  # of the names of a server's folders


class DiskTexts:
    """Saved sessions of one model in the folders of a folder.

    probe: a Session with the settings of all others. facts: what identifies the model, as in saved_session.
    about: what a session says of itself. prune: called with the folder of a new session, to delete others
    beyond a bound. prefix: of the names of the folders that may be overwritten.
    """

    def __init__(self, folder: str | os.PathLike, probe: Session, facts: Mapping[str, Any],
                 about: Mapping[str, Any], prune: Callable[[Path], None], prefix: str = PREFIX):
        self._folder, self._probe, self._facts = Path(folder), probe, facts
        self._about, self._prune, self._prefix = about, prune, prefix
        self._saved: dict[Path, SavedSession] = {}
        self.unusable: dict[Path, str] = {}  # folders with sessions of other models or settings, or damaged
        for path in sorted(self._folder.iterdir()) if self._folder.is_dir() else []:
            self._look(path)

    def __iter__(self):
        return iter(list(self._saved.values()))

    def get(self, folder: Path | None) -> SavedSession | None:
        return self._saved.get(folder)

    def best(self, ids: Sequence[int]) -> tuple[SavedSession | None, int]:
        """The text that shares most with token ids -> (it, tokens shared)."""
        ids = np.asarray(ids)
        found = [(common_prefix(one.ids, ids), i) for i, one in enumerate(self)]
        shared, i = max(found, default=(0, None))
        return None if i is None else list(self)[i], shared

    def own(self, saved: SavedSession) -> Path | None:
        """The folder of a text that may be overwritten, else None."""
        return saved.folder if saved.folder.name.startswith(self._prefix) else None

    def load(self, session: Session, texts: Sequence[tuple[SavedSession, int] | None]) -> list[int]:
        """Make the session hold the first tokens of texts, (text, how many) for each row from the first, or
        as many of them as are undamaged. Returns how many."""
        wanted = {}
        for saved, count in filter(None, texts):
            wanted[saved.folder] = saved, max(count, wanted.get(saved.folder, (saved, 0))[1])
        of_folder = {folder: self._intact(*one) for folder, one in wanted.items()}
        intact = [one and min(one[1], of_folder[one[0].folder]) for one in texts]
        if any(intact):
            rows = [one and (one[0], count) for one, count in zip(texts, intact, strict=True)]
            try:
                saved_session.load(session, rows)
            except (OSError, ValueError) as error:  # another process has replaced or deleted one
                print(f'WARNING: texts of {self._folder} are read anew: {error}', file=sys.stderr, flush=True)
                intact, of_folder = [0] * len(intact), dict.fromkeys(wanted, 0)
        for folder, (_, count) in wanted.items():
            if of_folder[folder] < count:
                self._look(folder)
        return [count or 0 for count in intact]

    def _intact(self, saved, length):
        """How many of the first tokens of a text are undamaged; notes when it was used."""
        try:
            intact = saved.verify(length)
            os.utime(saved.folder / saved_session.INDEX)
        except (OSError, ValueError) as error:  # another process has replaced or deleted it
            print(f'WARNING: session {saved.folder} is read anew: {error}', file=sys.stderr, flush=True)
            return 0
        if intact < length:
            print(f'WARNING: session {saved.folder} is damaged from token {intact:,} on (another crc32); the '
                  'rest is read anew', file=sys.stderr, flush=True)
        return intact

    def save(self, session: Session, folder: Path | None, row: int = 0) -> Path:
        """Write the text of a row, into a new folder for None. Returns the folder."""
        folder = folder or self._folder / f'{self._prefix}{secrets.token_hex(6)}'
        try:
            session_writer.save(folder, session, self._facts, row, self._about)
        finally:
            self._look(folder)
        self._prune(folder)
        self._saved = {path: one for path, one in self._saved.items() if path.exists()}
        return folder

    def _look(self, path):
        """Take note of what a folder holds by now, if it is a session of this model."""
        self._saved.pop(path, None)
        self.unusable.pop(path, None)
        try:
            if (path / saved_session.INDEX).exists():
                self._saved[path] = saved_session.read(path, self._probe, self._facts)
        except (ForeignSession, DamagedSession, OSError) as error:
            self.unusable[path] = str(error)  # nothing reads it, and a bound on the disk deletes it
