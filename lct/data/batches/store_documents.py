"""The documents of a token store as a model reads them: with the bos before each."""

import numpy as np

from lct.data.corpus.store import Store


class StoreDocuments:
    """Documents of a store whose token 0 is bos_id, if there is one.

    bos: int32 [0 or 1]. num_bos: its length. bytes_read: of the store so far, at four bytes per token.
    """

    def __init__(self, store: Store, bos_id: int | None):
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
        """int32 [stop - start]: tokens start..stop of a document, the bos included."""
        ids = self._store.tokens(int(document), max(int(start) - self.num_bos, 0), int(stop) - self.num_bos)
        self.bytes_read += 4 * len(ids)
        return np.concatenate([self.bos, ids]) if start < self.num_bos else ids
