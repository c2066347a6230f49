"""A token store in memory, and what the tests of its readers share."""

import hashlib

import numpy as np

from lct.data import tokenizer

BYTES = tokenizer.load('bytes')


class MemoryStore:
    """The attributes of store.Store over a list of int arrays."""

    def __init__(self, documents, sources=('all',), source_of=None):
        self.documents = [np.asarray(ids, np.int32) for ids in documents]
        self.lengths = np.array([len(ids) for ids in self.documents], np.int64)
        self.num_documents, self.num_tokens = len(documents), int(self.lengths.sum())
        self.sources = tuple(sources)
        source_of = np.zeros(len(documents), np.int32) if source_of is None else source_of
        self.source_of = np.asarray(source_of, np.int32)
        self.names = [f'document {number}' for number in range(len(documents))]
        self.tokenizer_hash, self.vocab_size = BYTES.fingerprint, BYTES.vocab_size
        content = b''.join(ids.tobytes() for ids in self.documents) + self.lengths.tobytes()
        self.fingerprint = hashlib.sha256(content + self.source_of.tobytes()).hexdigest()

    def tokens(self, document, start, stop):
        assert 0 <= start <= stop <= self.lengths[document]
        return self.documents[document][start:stop]


def lognormal(rng, count, median=60, sigma=1.2, longest=10**9):
    """Lengths with a long tail, some of them 0 and 1."""
    lengths = np.minimum(rng.lognormal(np.log(median), sigma, count).astype(np.int64), longest)
    lengths[rng.random(count) < 0.03] = 0
    lengths[rng.random(count) < 0.03] = 1
    return lengths


def make_store(seed=0, count=60, **options):
    """Documents of random bytes; the tokens do not reveal the number of their document."""
    rng = np.random.default_rng(seed)
    documents = [rng.integers(0, 256, n) for n in lognormal(rng, count, **options)]
    return MemoryStore(documents, ('books', 'code', 'web'), rng.integers(0, 3, count))
