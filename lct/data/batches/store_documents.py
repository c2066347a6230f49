"""The documents of a token store as a model reads them: with the bos before and the eos after each."""

import numpy as np

from lct.data.corpus.store import Store


class StoreDocuments:
    """Documents of a store whose token 0 is bos_id, if there is one.

    bos: int32 [0 or 1]. num_bos: its length. eos_id: what `tokens` gives for the token after the last, which
    is a target (see packing) and not counted in lengths; None for no such token. A store holds neither, so
    both are a choice of the run that reads it. bytes_read: of the store so far, at four bytes per token.
    """

    def __init__(self, store: Store, bos_id: int | None, eos_id: int | None = None):
        self.eos_id = eos_id
        self.bos = np.array([] if bos_id is None else [bos_id], np.int32)
        self.num_bos, self.bytes_read, self._store = len(self.bos), 0, store

    def lengths(self, documents: np.ndarray) -> np.ndarray:
        """int64 [n] of documents int64 [n]. An empty document has length 0: it gets no bos."""
        lengths = np.asarray(self._store.lengths[documents], np.int64)
        return np.where(lengths > 0, lengths + self.num_bos, 0)

    def describe(self, document: int) -> str:
        """A document's number and name, for an error."""
        return f'document {document} ({self._store.names[document]!r}) of the store'

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        """int32 [stop - start]: tokens start..stop of a document, the bos and the eos included."""
        first, last = max(int(start) - self.num_bos, 0), int(stop) - self.num_bos
        ends = self.eos_id is not None and last > self._store.lengths[document]
        ids = self._store.tokens(int(document), min(first, last - ends), last - ends)
        self.bytes_read += 4 * len(ids)
        bos = self.bos if start < self.num_bos else self.bos[:0]
        return np.concatenate([bos, ids, np.full(int(ends), self.eos_id or 0, np.int32)])
