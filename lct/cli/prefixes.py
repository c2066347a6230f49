"""What the prompts of evaluations begin with, on disk: sessions in the folder that --session names."""

import copy
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lct.cli import sessions
from lct.cli.progress import status
from lct.eval.prefixes import MIN_TOKENS, Prefixes, longest_rest
from lct.models.kv_cache import named_arrays
from lct.models.session import Rows, Session
from lct.weights.disk_texts import DiskTexts


class DiskPrefixes(Prefixes):
    """Prefixes in the sessions of a folder.

    facts: of the model, as sessions.model_facts. name: of the model. max_bytes: of all named sessions, or of
    those in the folder; what this evaluation has used or saved stays, so that a long one does not delete what
    the next one needs first.

    Raises:
      ForeignSession: if the folder holds anything else.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any], name: str, max_bytes: float):
        sessions.check_holds_texts(folder)
        self.folder, self._facts, self._about, self._max_bytes = folder, facts, {'model': name}, max_bytes
        self._texts: dict[Any, DiskTexts] = {}  # of each RoPE: 'dynamic' and 'longrope' scale by the length
        self._in_use: dict[Path, float] = {}  # folder: bytes
        self._damaged: set[Path] = set()
        self._seconds, self._full = 0.0, False

    def load(self, session: Session, prompts: Rows) -> list[int]:
        start, texts = time.monotonic(), self._texts_of(session)
        rows = [(saved, n) if n >= MIN_TOKENS else None for saved, n in map(texts.best, prompts)]
        counts = [0 if row is None else row[1] for row in rows]
        if longest_rest(prompts, counts) > longest_rest(prompts, [0] * len(prompts)) - MIN_TOKENS:
            return [0] * len(prompts)
        intact = texts.load(session, rows)
        for row, count in zip(rows, intact, strict=True):
            if row is not None:
                self._in_use[row[0].folder] = sum(block.bytes for block in row[0].blocks)
                if count < row[1]:
                    self._damaged.add(row[0].folder)
        self._seconds += time.monotonic() - start
        return intact

    def save(self, session: Session, row: int) -> None:
        texts, ids = self._texts_of(session), session.texts[row]
        best, shared = texts.best(ids)
        is_damaged = best is not None and best.folder in self._damaged
        if self._full or (len(ids) - shared < MIN_TOKENS and not is_damaged):
            return
        arrays = named_arrays(session.cache).values()
        size = sum(x.nbytes for x in arrays) / session.rows / session.seq_len * len(ids)
        # A text that begins with all of a saved one takes its place.
        folder = best.folder if best is not None and (shared == len(best.ids) or is_damaged) else None
        if sum(self._in_use.values()) - self._in_use.get(folder, 0) + size > self._max_bytes:
            self._stop(f'{self._max_bytes / 1e9:g} GB are full of texts of this evaluation; others are not '
                       'saved')
            return
        try:
            self._in_use[texts.save(session, folder, row)] = size
            self._damaged.discard(folder)
        except OSError as error:
            self._stop(f'not saved: {error}')

    def report(self) -> None:
        """A status line on the prompts since the last one."""
        if total := self.read + self.reused:
            status('session', f'{self.reused:,} of {total:,} tokens reused from {self.folder} in '
                              f'{self._seconds:.2f} s')
        self.read, self.reused, self._seconds = 0, 0, 0.0

    def _stop(self, why):
        self._full = True
        status('session', why)

    def _texts_of(self, session):
        if session.rope not in self._texts:
            probe = copy.copy(session)
            probe.cache = probe.logits = None  # which would stay in memory
            texts = DiskTexts(self.folder, probe, self._facts, self._about, self._prune, '')
            if texts.unusable and not self._texts:
                status('session', f'{len(texts.unusable)} of {len(texts.unusable) + len([*texts])} texts in '
                                  f'{self.folder} are not used: {next(iter(texts.unusable.values()))}')
            self._texts[session.rope] = texts
        return self._texts[session.rope]

    def _prune(self, new):
        all_named = self.folder.parent == sessions.root()
        sessions.keep_within(self._max_bytes / 1e9, [new, *self._in_use], None if all_named else self.folder)
