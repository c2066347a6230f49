"""The documents of one source in each epoch: their order, which of them are used, and which are held out."""

import zlib
from typing import NamedTuple

import numpy as np

from lct.data.batches.random_order import shuffled, uniform
from lct.data.batches.store_documents import StoreDocuments
from lct.data.batches.upsample import Upsample
from lct.data.batches.upsample import chosen as upsampled

HOLD_OUT, ORDER, CHOICE = 1, 2, 3  # first component of a random key: what it decides

Cursor = tuple[int, int]  # (epoch, place in its order)


class Taken(NamedTuple):
    """Documents of an order. documents, lengths: int64 [n]. cursor: after them."""
    documents: np.ndarray
    lengths: np.ndarray
    cursor: Cursor


class EpochOrder:
    """Documents of a store (all, if subset is None), reshuffled in every epoch.

    num_documents: of the whole store. held_out: the fraction of all documents that no epoch uses, the same
    ones for every seed and every source.
    """

    FIRST_READ = 1024  # places read at first; each further read is twice as long
    MAX_EPOCHS = 1000  # of one call of take
    MAX_HELD_OUT_READ = 2**18  # documents among which held-out ones are looked for

    def __init__(self, name: str, documents: StoreDocuments, num_documents: int,
                 subset: np.ndarray | None = None, *, seed: int = 0, held_out: float = 0.0,
                 upsample: Upsample | None = None):
        self.name, self.size = name, num_documents if subset is None else len(subset)
        self._documents, self._subset = documents, subset
        self._seed, self._held_out, self._upsample = seed, held_out, upsample
        self._id = zlib.crc32(name.encode())
        if not self.size:
            raise ValueError(f'source {name!r} has no documents; leave it out of the mix')

    def take(self, cursor: Cursor, num_tokens: int, past_end: bool) -> Taken:
        """The documents from cursor on that hold at most num_tokens, at least one; empty ones are skipped.

        past_end: continue with the next epochs if needed.
        """
        epoch, place = cursor
        if place >= self.size:
            raise ValueError(f'data state is at document {place} of an epoch of {self.size} of '
                             f'{self.name!r}: it belongs to another corpus; resume with the corpus of the '
                             'run, or start a new run')
        documents, lengths, total, read_len, full = [], [], 0, self.FIRST_READ, False
        while not full:
            places = np.arange(place, min(place + read_len, self.size))
            numbers = self._numbers(shuffled(self.size, places, (ORDER, self._seed, self._id, epoch)))
            sizes, is_trained = self._trained(numbers, epoch)
            sums = np.cumsum(np.where(is_trained, sizes, 0))
            used = int(np.searchsorted(sums, num_tokens - total, side='right'))
            full = used < len(numbers)
            if full and not total and not sums[:used].any():
                used += 1
            documents.append(numbers[:used][is_trained[:used]])
            lengths.append(sizes[:used][is_trained[:used]])
            total, place, read_len = total + int(sums[:used].max(initial=0)), place + used, 2 * read_len
            if place == self.size:
                epoch, place = epoch + 1, 0
                full |= total > 0 and not past_end
                self._check_epochs(epoch - cursor[0], total, num_tokens)
        return Taken(np.concatenate(documents), np.concatenate(lengths), (epoch, place))

    def draw(self, rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(documents int64 [n], lengths int64 [n]): the training documents at `count` random places."""
        numbers = self._numbers(rng.integers(self.size, size=count))
        sizes, is_trained = self._trained(numbers, None)
        return numbers[is_trained], sizes[is_trained]

    def held_out(self, num_tokens: int) -> np.ndarray:
        """int64 [n]: held-out documents with at least one target, until they hold num_tokens or none is left.

        They are those among MAX_HELD_OUT_READ random documents, the longest first, since evaluations need
        long documents.
        """
        places = np.arange(min(self.size, self.MAX_HELD_OUT_READ))
        numbers = self._numbers(shuffled(self.size, places, (HOLD_OUT,)))
        numbers = numbers[uniform(numbers, (HOLD_OUT,)) < self._held_out]
        sizes = self._documents.lengths(numbers)
        order = np.argsort(-sizes, kind='stable')
        order = order[:int(np.searchsorted(np.cumsum(sizes[order]), num_tokens)) + 1]
        return numbers[order][sizes[order] > 1]

    def _check_epochs(self, epochs: int, total: int, num_tokens: int) -> None:
        if epochs > (self.MAX_EPOCHS if total else 1):
            raise ValueError(f'source {self.name!r} has {total} tokens in {epochs} epochs of {self.size} '
                             f'documents, and {num_tokens} are to come from it; add text, lower its weight, '
                             'or keep more of its short documents')

    def _trained(self, documents: np.ndarray, epoch: int | None) -> tuple[np.ndarray, np.ndarray]:
        """(lengths int64 [n], bool [n]: is trained on in this epoch; or in any, if epoch is None)."""
        sizes = self._documents.lengths(documents)
        is_trained = (sizes > 0) & (uniform(documents, (HOLD_OUT,)) >= self._held_out)
        if self._upsample is not None and epoch is not None:
            is_trained &= upsampled(self._upsample, documents, sizes, (CHOICE, self._seed, self._id, epoch))
        return sizes, is_trained

    def _numbers(self, places: np.ndarray) -> np.ndarray:
        """The store's document numbers at places int64 [n] of this source."""
        return places if self._subset is None else self._subset[places]
