"""Long documents out of short ones: after every chunk of a document stand the chunks of others that are most
like it, so that what comes next is predicted from far back (NExtLong, Gao et al. 2025, arXiv:2501.12766,
section 3.1). NExtLong finds them by embeddings; here they are found by BM25 (Robertson and Zaragoza 2009).
"""

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from lct.data.corpus.documents import Document

K1, B = 1.2, 0.75  # of BM25
QUERY_TERMS = 48  # the rarest terms of a chunk; frequent ones cost most and say least
SURPLUS = 1.5  # negatives are retrieved for so many times the length, because those in use are left out


class Chunk(NamedTuple):
    """document: number of its document."""

    document: int
    text: str


def split(text: str, size: int) -> list[str]:
    """Chunks of at most `size` characters, together the text, that end at line ends where they can."""
    chunks, start = [], 0
    while start < len(text):
        stop = min(start + size, len(text))
        if stop < len(text):
            stop = text.rfind('\n', start, stop) + 1 or stop
        chunks.append(text[start:stop])
        start = stop
    return chunks


class Chunks:
    """The chunks of documents, and which of them are alike."""

    def __init__(self, documents: Sequence[Document], size: int):
        self.all = [Chunk(i, text) for i, one in enumerate(documents) for text in split(one.text, size)]
        self.of_document = [[] for _ in documents]
        for number, chunk in enumerate(self.all):
            self.of_document[chunk.document].append(number)
        self.mean_size = sum(len(chunk.text) for chunk in self.all) / max(len(self.all), 1)
        counts = [Counter(_terms(chunk.text)) for chunk in self.all]
        lengths = np.array([max(count.total(), 1) for count in counts])
        self._norms = K1 * (1 - B + B * lengths / lengths.mean())
        found = {}
        for number, count in enumerate(counts):
            for term, times in count.items():
                found.setdefault(term, []).append((number, times))
        self._postings = {term: np.array(pairs) for term, pairs in found.items() if len(pairs) > 1}

    def like(self, number: int, count: int, taken: set[int]) -> list[int]:
        """Numbers of the `count` chunks of other documents most like a chunk, without those in taken."""
        document = self.all[number].document
        terms = sorted((term for term in set(_terms(self.all[number].text)) if term in self._postings),
                       key=lambda term: len(self._postings[term]))
        scores = np.zeros(len(self.all))
        for term in terms[:QUERY_TERMS]:
            numbers, times = self._postings[term].T
            idf = math.log(1 + (len(self.all) - len(numbers) + 0.5) / (len(numbers) + 0.5))
            scores[numbers] += idf * times * (K1 + 1) / (times + self._norms[numbers])
        scores[self.of_document[document]] = -1
        scores[list(taken)] = -1
        best = np.argsort(-scores, kind='stable')[:count]
        return [int(one) for one in best if scores[one] >= 0]


def interleave(chunks: Chunks, length: int, seed: int = 0) -> Iterator[list[Chunk]]:
    """Documents of about `length` characters without end, as lists of chunks: those of one document in their
    order, each followed by hard negatives, none of which comes twice.

    Every document gives one before any gives another; those that are long enough alone give none.

    Raises:
      ValueError: if no document is shorter than length.
    """
    sizes = [sum(len(chunks.all[one].text) for one in numbers) for numbers in chunks.of_document]
    short = [i for i, size in enumerate(sizes) if 0 < size < length]
    if not short or len(sizes) < 2:
        raise ValueError(f'none of the {len(sizes)} documents is shorter than {length:,} characters, so '
                         'nothing has to stand between their chunks; use a longer length, or train on them')
    for epoch in itertools.count():
        for i in np.random.default_rng([seed, epoch]).permutation(len(short)):
            yield _with_negatives(chunks, short[i], length - sizes[short[i]])


def _with_negatives(chunks, document, room):
    """The chunks of a document with `room` characters of others evenly between them."""
    own, taken, out = chunks.of_document[document], set(), []
    for i, number in enumerate(own):
        out.append(chunks.all[number])
        wanted = room / (len(own) - i)
        for other in chunks.like(number, math.ceil(SURPLUS * wanted / chunks.mean_size) + 1, taken):
            if wanted <= 0:
                break
            taken.add(other)
            out.append(chunks.all[other])
            wanted -= len(chunks.all[other].text)
            room -= len(chunks.all[other].text)
    return out


def _terms(text):
    return re.findall(r'\w+', text.lower())
