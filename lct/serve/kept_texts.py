"""The texts that were read for earlier requests, in caches that the next request may continue.

A request continues the text with which it shares the longest beginning. Texts that were not used for the
longest time are dropped first.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from lct import sharding
from lct.models.kv_cache import CACHE, named_arrays
from lct.models.prompt_layout import common_prefix
from lct.models.session import Session

MIN_SHARED = 16  # tokens; texts that share fewer have a cache each
MAX_DROPPED = 256  # tokens of a kept text that another request may overwrite; a longer rest is worth a copy


@dataclasses.dataclass
class KeptText:
    """A Session, the bytes of its cache, and when it was used last."""

    session: Session
    used: float

    @property
    def ids(self) -> list[int]:
        return self.session.texts[0]

    @property
    def num_bytes(self) -> int:
        return sum(x.nbytes for x in jax.tree.leaves(self.session.cache))


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


class KeptTexts:
    """Sessions by the texts in them.

    make_session: cache slots -> an empty Session. max_bytes: of all caches, that of the request that is
    answered included, unless it alone takes more.
    """

    def __init__(self, make_session: Callable[[int], Session], max_bytes: int):
        self._make, self.max_bytes = make_session, max_bytes
        self._texts: list[KeptText] = []
        self._bytes_per_slot = 0  # known from the first cache on
        self.listing: list[dict[str, Any]] = []  # replaced, never changed: other threads read it

    def take(self, ids: Sequence[int], slots: int) -> Session:
        """The Session to update with a text of token ids, with `slots` cache slots or more. It belongs to the
        caller until it is given to `keep`."""
        best, shared = self._best(ids)
        if shared < min(MIN_SHARED, len(ids) - 1):
            self._make_room(slots)
            return self._make(slots)
        best.used = time.monotonic()
        is_free = len(best.ids) - shared <= MAX_DROPPED
        if is_free:
            self._texts.remove(best)
            if best.session.seq_len >= slots:
                return best.session
        self._make_room(slots)
        session = self._make(slots)
        copy_text(best.session, session, shared)
        return session

    def _best(self, ids):
        """The text that shares most with ids, of the largest cache among equals -> (it, tokens shared)."""
        found = [(common_prefix(one.ids, ids), one.session.seq_len, i) for i, one in enumerate(self._texts)]
        shared, _, i = max(found, default=(0, 0, None))
        return None if i is None else self._texts[i], shared

    def keep(self, session: Session) -> None:
        """Keep a Session with the text in it."""
        if session.cache is None or not len(session.texts[0]):
            return
        self._texts.append(KeptText(session, time.monotonic()))
        self._bytes_per_slot = self._texts[-1].num_bytes / session.seq_len
        self._make_room(0)

    def drop_all(self) -> None:
        self._texts.clear()
        self._list()

    def _make_room(self, slots):
        """Drop texts until a cache of `slots` fits too."""
        texts, new = self._texts, self._bytes_per_slot * slots
        while texts and sum(one.num_bytes for one in texts) + new > self.max_bytes:
            texts.remove(min(texts, key=lambda one: one.used))
        self._list()

    def _list(self):
        self.listing = [{'tokens': len(one.ids), 'slots': one.session.seq_len, 'bytes': one.num_bytes,
                         'place': 'memory'}
                        for one in sorted(self._texts, key=lambda one: -one.used)]
