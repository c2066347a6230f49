"""The documents of one source, epoch by epoch: their order, which of them come, and which are held out of all."""

import zlib

import numpy as np

from lct.data.batches.random_order import shuffled, uniform
from lct.data.batches.upsample import chosen as upsampled

HOLD_OUT, ORDER, CHOICE = 1, 2, 3  # what a random key is for


class EpochOrder:
    """Some documents of a store (all, if chosen is None), shuffled anew in every epoch.

    documents: slices.Documents; num_documents: of the whole store. held_out: the fraction of all documents that
    no epoch has, the same ones for every seed and every source. upsample: upsample.Upsample or None.
    """

    FIRST_LOOK = 1024
    MOST_EPOCHS = 1000  # that one call of take may go through
    MOST_SHOWN = 2**18  # documents that are looked at for held-out ones

    def __init__(self, name, documents, num_documents, chosen=None, *, seed=0, held_out=0.0, upsample=None):
        self.name, self.size = name, num_documents if chosen is None else len(chosen)
        self._documents, self._chosen = documents, chosen
        self._seed, self._held_out, self._upsample = seed, held_out, upsample
        self._id = zlib.crc32(name.encode())
        if not self.size:
            raise ValueError(f'source {name!r} has no documents; leave it out of the mix')

    def take(self, cursor, num_tokens, past_end):
        """-> (documents int64 [n], lengths int64 [n], cursor): from cursor = (epoch, place) on, as many as num_tokens
        hold, one at least. Empty documents are passed over; past_end: into the next epochs if need be."""
        epoch, place = cursor
        if place >= self.size:
            raise ValueError(f'data state is at document {place} of an epoch of {self.size} of {self.name!r}: it '
                             'belongs to another corpus; resume with the one of the run, or start a new run')
        documents, lengths, total, look, full = [], [], 0, self.FIRST_LOOK, False
        while not full:
            places = np.arange(place, min(place + look, self.size))
            some = self._numbers(shuffled(self.size, places, (ORDER, self._seed, self._id, epoch)))
            sizes, wanted = self._trained(some, epoch)
            sums = np.cumsum(np.where(wanted, sizes, 0))
            used = int(np.searchsorted(sums, num_tokens - total, side='right'))
            full = used < len(some)
            if full and not total and not sums[:used].any():
                used += 1
            documents.append(some[:used][wanted[:used]])
            lengths.append(sizes[:used][wanted[:used]])
            total, place, look = total + int(sums[:used].max(initial=0)), place + used, 2 * look
            if place == self.size:
                epoch, place = epoch + 1, 0
                full |= total > 0 and not past_end
                if epoch > cursor[0] + (self.MOST_EPOCHS if total else 1):
                    raise ValueError(f'source {self.name!r} has {total} tokens in {epoch - cursor[0]} epochs of '
                                     f'{self.size} documents, and {num_tokens} are to come from it; add text, '
                                     'lower its weight, or keep more of its short documents')
        return np.concatenate(documents), np.concatenate(lengths), (epoch, place)

    def draw(self, rng, count):
        """-> (documents int64 [n], lengths int64 [n]): what count random places hold for training."""
        some = self._numbers(rng.integers(self.size, size=count))
        sizes, wanted = self._trained(some, None)
        return some[wanted], sizes[wanted]

    def held_out(self, num_tokens):
        """-> int64 [n]: held-out documents with a target, until they have num_tokens or there are no more; the longest
        first, since evaluations need long ones, of those that many random documents show."""
        some = self._numbers(shuffled(self.size, np.arange(min(self.size, self.MOST_SHOWN)), (HOLD_OUT,)))
        some = some[uniform(some, (HOLD_OUT,)) < self._held_out]
        sizes = self._documents.lengths(some)
        order = np.argsort(-sizes, kind='stable')
        order = order[:int(np.searchsorted(np.cumsum(sizes[order]), num_tokens)) + 1]
        return some[order][sizes[order] > 1]

    def _trained(self, documents, epoch):
        """-> (lengths int64 [n], bool [n]: which of documents an epoch trains on; without an epoch, any does)."""
        sizes = self._documents.lengths(documents)
        wanted = (sizes > 0) & (uniform(documents, (HOLD_OUT,)) >= self._held_out)
        if self._upsample is not None and epoch is not None:
            wanted &= upsampled(self._upsample, documents, sizes, (CHOICE, self._seed, self._id, epoch))
        return sizes, wanted

    def _numbers(self, places):
        """The store's numbers of places int64 [n]."""
        return places if self._chosen is None else self._chosen[places]
