"""Recall, copy and forms rows and stretches of one long document over a token store.

All but the last are laid out in full, as in recall.py, but over a haystack of references (-1, -2, ...) in
place of tokens, so that each process reads only the text that its devices hold. The layout is work for every
token of the row, in every process, but reads nothing.
"""

from typing import NamedTuple

import numpy as np

from lct.data.batches.epoch_order import EpochOrder
from lct.data.batches.store_documents import StoreDocuments
from lct.data.sequence import Sequence
from lct.data.synthetic.forms.documents import form_documents
from lct.data.synthetic.forms.passages import PassageEncoder
from lct.data.synthetic.recall import RecallVocabulary, Row, copy_row, recall_documents

BATCH = 64  # documents drawn at a time
MAX_BATCHES = 100  # without a document that is long enough


class Span(NamedTuple):
    """Tokens start..stop of a document of the store."""
    document: int
    start: int
    stop: int


def recall(rng: np.random.Generator, vocabulary: RecallVocabulary, spans: list[Span],
           seq_len: int) -> Sequence:
    """Recall documents that fill seq_len tokens, over the text of spans."""
    return _sequence(recall_documents(rng, vocabulary, _references(spans), seq_len), spans, vocabulary.bos)


def forms(rng: np.random.Generator, encoder: PassageEncoder, spans: list[Span], seq_len: int) -> Sequence:
    """Documents of generated forms that fill seq_len tokens, over the text of spans."""
    return _sequence(form_documents(rng, encoder, _references(spans), seq_len), spans, encoder.bos)


def copy(rng: np.random.Generator, spans: list[Span], seq_len: int, vocab_ids: np.ndarray,
         bos: list[int]) -> Sequence:
    """A copy row of seq_len tokens. vocab_ids int [m]: the ids of random tokens. bos: [id] or []."""
    return _sequence([copy_row(rng, _references(spans), seq_len - len(bos), vocab_ids=vocab_ids)], spans, bos)


def long(rng: np.random.Generator, source: EpochOrder, documents: StoreDocuments, seq_len: int) -> Sequence:
    """A stretch of one document that fills seq_len tokens.

    All stretches of the documents drawn are equally likely.

    Raises:
      ValueError: if no document is long enough.
    """
    n = seq_len - documents.num_bos
    for _ in range(MAX_BATCHES):
        drawn, sizes = source.draw(rng, BATCH)
        starts = np.maximum(sizes - seq_len + 1, 0)
        if starts.any():
            i = rng.choice(len(starts), p=starts / starts.sum())
            start = documents.num_bos + int(rng.integers(starts[i]))
            row = _references([Span(0, 0, n)]), np.ones(n)
            return _sequence([row], [Span(int(drawn[i]), start, start + n)], documents.bos)
    raise ValueError(f"mixture kind 'long' needs documents of seq_len {seq_len} tokens, and none of "
                     f'{MAX_BATCHES * BATCH:,} drawn from {source.name!r} is that long; add longer '
                     "documents, or use kind 'text', which packs short ones")


def random_spans(rng: np.random.Generator, source: EpochOrder, documents: StoreDocuments, length: int,
                 min_len: int) -> list[Span]:
    """Spans of `length` tokens in total, from documents of min_len tokens or more.

    The longest documents of every batch come first. The last span is a random stretch of its document.

    Raises:
      ValueError: if no document is long enough.
    """
    spans, left, misses = [], length, 0
    while left:
        drawn, sizes = source.draw(rng, BATCH)
        sizes = sizes - documents.num_bos
        drawn, sizes = drawn[sizes >= min_len], sizes[sizes >= min_len]
        misses = 0 if len(drawn) else misses + 1
        if misses == MAX_BATCHES:
            raise ValueError(f'chats and recall need documents of {min_len} tokens or more, and none of '
                             f'{MAX_BATCHES * BATCH:,} drawn from {source.name!r} is that long; '
                             'leave them out of the mixture')
        for i in np.argsort(-sizes, kind='stable'):
            n = min(int(sizes[i]), left)
            start = documents.num_bos + int(rng.integers(sizes[i] - n + 1))
            spans += [Span(int(drawn[i]), start, start + n)] if n else []
            left -= n
    return spans


def _references(spans: list[Span]) -> np.ndarray:
    """int [n]: id -1 - k refers to token k of the spans, one after the other."""
    return -1 - np.arange(sum(stop - start for _, start, stop in spans))


def _sequence(rows: list[Row], spans: list[Span], bos: list[int]) -> Sequence:
    """The Sequence of rows, one segment each, with references into spans."""
    sizes = [len(bos) + len(ids) for ids, _ in rows]
    ids = np.concatenate([x for row, _ in rows for x in (bos, row)]).astype(np.int64)
    weights = np.concatenate([x for _, row in rows for x in (np.zeros(len(bos)), row)]).astype(np.float32)
    segment = np.repeat(np.arange(1, len(rows) + 1, dtype=np.int32), sizes)
    position = np.arange(len(ids)) - np.repeat(np.cumsum(sizes) - sizes, sizes)

    span_document, span_start, span_stop = np.array(spans, np.int64).T
    ends = np.cumsum(span_stop - span_start)
    refers = ids < 0
    span = np.minimum(np.searchsorted(ends, -1 - ids, 'right'), len(spans) - 1)
    document = np.where(refers, span_document[span], -1)
    place = np.where(refers, span_stop[span] - ends[span] - 1 - ids, np.cumsum(~refers) - 1)
    changes = [np.diff(x) != 0 for x in (document, weights, segment)] + [np.diff(place) != 1]
    first = np.append(0, np.flatnonzero(np.any(changes, axis=0)) + 1)
    last = np.append(first[1:], len(ids)) - 1
    return Sequence(
        document=document[first], start=place[first], stop=place[last] + 1, segment=segment[first],
        position=position[first], weight=weights[first], follows=position[first] > 0,
        continues=np.zeros(len(first), bool), ids=ids[~refers].astype(np.int32),
    )
