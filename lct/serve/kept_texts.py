"""The texts that were read for earlier requests, in caches that the next request may continue.

A request continues the text with which it shares the longest beginning, in memory or on disk. Texts that were
not used for the longest time leave the memory first.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from lct import sharding
from lct.models.kv_cache import CACHE, named_arrays
from lct.models.prompt_layout import common_prefix
from lct.models.session import Session
from lct.weights.disk_texts import DiskTexts

MIN_SHARED = 16  # tokens; texts that share fewer have a cache each
MAX_DROPPED = 256  # tokens of a kept text that another request may overwrite; a longer rest is worth a copy
MIN_SAVED = 128  # new tokens that are worth writing to disk


@dataclasses.dataclass
class KeptText:
    """A Session, where it is kept on disk, which of its token ids were last there, and when it was used."""

    session: Session
    folder: Path | None = None
    saved: Sequence[int] = ()
    used: float = 0.0

    @property
    def ids(self) -> list[int]:
        return self.session.texts[0]

    @property
    def num_bytes(self) -> int:
        return sum(x.nbytes for x in jax.tree.leaves(self.session.cache))


class KeptTexts:
    """Sessions by the texts in them.

    make_session: cache slots -> an empty Session. max_bytes: of all caches, that of the request that is
    answered included, unless it alone takes more. disk: None to keep nothing there.
    """

    def __init__(self, make_session: Callable[[int], Session], max_bytes: int, disk: DiskTexts | None = None):
        self._make, self.max_bytes, self._disk = make_session, max_bytes, disk
        self._texts: list[KeptText] = []
        self._bytes_per_slot = 0  # known from the first cache on
        self.listing: list[dict[str, Any]] = []  # replaced, never changed: other threads read it
        self._list()

    def take(self, ids: Sequence[int], slots: int) -> KeptText:
        """The text to update to token ids, with `slots` cache slots or more. It belongs to the caller until
        it is given to `keep`."""
        if self._disk is not None and (loaded := self._load(ids, slots, self._best(ids)[1])):
            return loaded
        best, shared = self._best(ids)
        if shared < min(MIN_SHARED, len(ids) - 1):
            return self._new(slots)
        best.used = time.monotonic()
        is_free = len(best.ids) - shared <= MAX_DROPPED
        if is_free:
            self._texts.remove(best)
            if best.session.seq_len >= slots:
                return best
        copy = self._new(slots)
        if is_free:
            copy.folder, copy.saved = best.folder, best.saved
        copy_text(best.session, copy.session, shared)
        return copy

    def keep(self, text: KeptText) -> None:
        """Keep a text for later requests."""
        if text.session.cache is None or not len(text.ids):
            return
        text.used = time.monotonic()
        self._texts.append(text)
        self._bytes_per_slot = text.num_bytes / text.session.seq_len
        self._make_room(0)

    def drop_all(self) -> None:
        """Free the memory."""
        self._texts.clear()
        self._list()

    def save_one(self) -> bool:
        """Write the text that was used last among those that the disk does not have. Returns whether there
        was one."""
        unsaved = [one for one in self._texts if self._is_unsaved(one)]
        if unsaved:
            self._save(max(unsaved, key=lambda one: one.used))
        return bool(unsaved)

    def save_all(self) -> None:
        """Write all texts that the disk does not have, once each; one that cannot be written is named."""
        for text in sorted(self._texts, key=lambda one: -one.used):
            self._save_or_warn(text)

    def _best(self, ids):
        """The text that shares most with ids, of the largest cache among equals -> (it, tokens shared)."""
        found = [(common_prefix(one.ids, ids), one.session.seq_len, i) for i, one in enumerate(self._texts)]
        shared, _, i = max(found, default=(0, 0, None))
        return None if i is None else self._texts[i], shared

    def _load(self, ids, slots, shared):
        """The text on disk that shares more with ids than any in memory, or None."""
        saved, on_disk = self._disk.best(ids)
        if on_disk < shared + MIN_SHARED:
            return None
        text = self._new(slots)
        folder = self._disk.own(saved) if len(saved.ids) - on_disk <= MAX_DROPPED else None
        if folder and all(one.folder != folder for one in self._texts):  # a folder has one writer
            text.folder, text.saved = folder, saved.ids
        return text if self._disk.load(text.session, [(saved, on_disk)])[0] > shared else None

    def _new(self, slots):
        self._make_room(slots)
        return KeptText(self._make(slots))

    def _is_unsaved(self, text):
        # Not what the disk holds now: a text that its bound has deleted would be written again for ever.
        return self._disk is not None and len(text.ids) - common_prefix(text.saved, text.ids) >= MIN_SAVED

    def _save(self, text):
        text.folder = self._disk.save(text.session, text.folder)
        text.saved = list(text.ids)
        self._list()

    def _save_or_warn(self, text):
        try:
            if self._is_unsaved(text):
                self._save(text)
        except (OSError, ValueError) as error:
            print(f'WARNING: a text of {len(text.ids):,} tokens is not kept: {error}', file=sys.stderr)

    def _make_room(self, slots):
        """Drop texts from memory until a cache of `slots` fits too."""
        texts, new = self._texts, self._bytes_per_slot * slots
        while texts and sum(one.num_bytes for one in texts) + new > self.max_bytes:
            oldest = min(texts, key=lambda one: one.used)
            texts.remove(oldest)
            self._save_or_warn(oldest)
        self._list()

    def _list(self):
        in_memory = {one.folder for one in self._texts}
        listing = [{'tokens': len(one.ids), 'slots': one.session.seq_len, 'bytes': one.num_bytes,
                    'place': 'memory and disk' if self._disk and self._disk.get(one.folder) else 'memory'}
                   for one in sorted(self._texts, key=lambda one: -one.used)]
        for saved in self._disk or ():
            if saved.folder not in in_memory:
                size = sum(block.bytes for block in saved.blocks)
                listing.append({'tokens': len(saved.ids), 'slots': 0, 'bytes': size, 'place': 'disk'})
        self.listing = listing


def copy_text(source: Session, target: Session, length: int) -> None:
    """Make the target hold the first `length` tokens of the source, in its own layout."""
    positions = np.empty(target.seq_len, np.int64)
    positions[target.slots] = np.arange(target.seq_len)
    slots = source.slots[np.minimum(positions, source.seq_len - 1)]
    arrays = {name: _take(x, slots) for name, x in named_arrays(source.cache).items()}
    target.restore(arrays, [ids[:length] for ids in source.texts])


@jax.jit
def _take(x, slots):
    """x [L, B, K, S, ...] with its slots in another order, or more or fewer of them."""
    if sharding.current_mesh() is None:
        return x[:, :, :, slots]
    return x.at[:, :, :, slots].get(out_sharding=P(*CACHE[:x.ndim]))
