"""The other rows of a mixture over a store: recall and copy (recall.py), and stretches of one long document.

The first two are laid out whole, with references where their text comes from the store: they are made over a haystack of references (-1, -2, ...)
in place of tokens, so that of the text each process reads only what it holds. Laying one out is work for every
token of the row, in every process, but reads nothing.
"""

import numpy as np

from lct.data.sequence import Sequence
from lct.data.synthetic.recall import copy_row, recall_documents


def recall(rng, words, spans, seq_len):
    """-> Sequence of seq_len tokens. spans [(document, start, stop)]: the text to draw from, of the store."""
    return _sequence(recall_documents(rng, words, _references(spans), seq_len), spans, words.bos)


def copy(rng, spans, seq_len, vocabulary, bos):
    """-> Sequence of seq_len tokens. vocabulary int [m]: the ids that random spans are made of. bos: [id] or []."""
    return _sequence([copy_row(rng, _references(spans), seq_len - len(bos), vocabulary=vocabulary)], spans, bos)


def long(rng, source, documents, seq_len):
    """-> Sequence of seq_len tokens: one stretch of one document that fills it, every stretch of the documents drawn
    as likely as every other."""
    n = seq_len - documents.num_bos
    for _ in range(100):
        drawn, sizes = source.draw(rng, 64)
        starts = np.maximum(sizes - seq_len + 1, 0)
        if starts.any():
            i = rng.choice(len(starts), p=starts / starts.sum())
            at = documents.num_bos + int(rng.integers(starts[i]))
            return _sequence([(_references([(0, 0, n)]), np.ones(n))], [(int(drawn[i]), at, at + n)], documents.bos)
    raise ValueError(f"mixture kind 'long' needs documents of seq_len {seq_len} tokens, and none of 6,400 drawn from "
                     f"{source.name!r} is that long; add longer documents, or use kind 'text', which packs short ones")


def _references(spans):
    return -1 - np.arange(sum(stop - start for _, start, stop in spans))


def _sequence(rows, spans, bos):
    """The Sequence of rows [(ids int [n], weights [n])], one segment each, in which id -1 - k is token k of spans."""
    sizes = [len(bos) + len(ids) for ids, _ in rows]
    ids = np.concatenate([part for row, _ in rows for part in (bos, row)]).astype(np.int64)
    weights = np.concatenate([part for _, row in rows for part in (np.zeros(len(bos)), row)]).astype(np.float32)
    segment = np.repeat(np.arange(1, len(rows) + 1, dtype=np.int32), sizes)
    position = np.arange(len(ids)) - np.repeat(np.cumsum(sizes) - sizes, sizes)

    of, first, stop = np.array(spans, np.int64).T
    ends = np.cumsum(stop - first)
    refers = ids < 0
    span = np.minimum(np.searchsorted(ends, -1 - ids, 'right'), len(spans) - 1)
    document = np.where(refers, of[span], -1)
    place = np.where(refers, stop[span] - ends[span] - 1 - ids, np.cumsum(~refers) - 1)
    changes = [np.diff(x) != 0 for x in (document, weights, segment)] + [np.diff(place) != 1]
    at = np.append(0, np.flatnonzero(np.any(changes, axis=0)) + 1)
    last = np.append(at[1:], len(ids)) - 1
    return Sequence(
        document=document[at], start=place[at], stop=place[last] + 1, segment=segment[at], position=position[at],
        weight=weights[at], follows=position[at] > 0, continues=np.zeros(len(at), bool),
        ids=ids[~refers].astype(np.int32),
    )
