"""Documents packed into rows of seq_len tokens. Segment ids keep the documents of a row apart.

A row is a dict of [T] arrays: tokens, targets, positions, segment_ids (int32) and loss_mask (float32, also a
weight). Segments count from 1; 0 is padding. Positions restart with each segment. The target of a token is
the next token of the same document; that of the last one is the end of text (EOS) in training, and none
(loss_mask 0) in evaluations. The EOS is not an input: what follows it is another document, which begins with
the BOS. Documents that end in it are the convention of the field: torchtitan's
hf_datasets/text_datasets.py encodes every one with add_bos=True, add_eos=True, as Llama-3's own
<|begin_of_text|> and <|end_of_text|> are meant. Without it, the probability of EOS can only fall in training.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np


class Segment(NamedTuple):
    """One segment of a row. tokens, targets: int32 [n]; weights: float32 [n], of the targets."""
    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray


def segment(ids: Sequence[int] | np.ndarray, weights: np.ndarray | None = None, bos_id: int | None = None,
            start: int = 0, stop: int | None = None, eos_id: int | None = None) -> Segment:
    """Tokens start..stop of the document (bos_id, *ids) as a Segment.

    ids int [n]; weights float [n] or None for ones: weights[i] is the loss weight of predicting ids[i]. Where
    stop is not the document's end, the last target is the token at stop. The next row has that token as its
    first input, so every token but the first is predicted exactly once, however the document is cut. Where
    stop is the end, the last target is eos_id, with weight 1, or none.
    """
    num_bos = int(bos_id is not None)
    end = len(ids) + num_bos
    stop = end if stop is None else stop
    first = max(start - num_bos, 0)
    tokens = np.asarray(ids[first:stop - num_bos], np.int32)
    if num_bos and start == 0 and stop > 0:
        tokens = np.concatenate([np.array([bos_id], np.int32), tokens])
    following = slice(start + 1 - num_bos, stop + 1 - num_bos)
    targets = np.zeros(len(tokens), np.int32)
    known = np.asarray(ids[following], np.int32)
    targets[:len(known)] = known
    mask = np.zeros(len(tokens), np.float32)
    mask[:len(known)] = 1 if weights is None else weights[following]
    if eos_id is not None and stop == end and len(tokens):
        targets[-1], mask[-1] = eos_id, 1
    return Segment(tokens, targets, mask)


def pack(segments: Sequence[Segment], seq_len: int) -> dict[str, np.ndarray]:
    """The row of Segments with at most seq_len tokens in total; the rest of it is padding (segment 0).

    Raises:
      ValueError: if the segments are longer than the row.
    """
    lengths = [len(p.tokens) for p in segments]
    total = sum(lengths)
    if total > seq_len:
        raise ValueError(f'segments of {total} tokens do not fit into a row of seq_len {seq_len}; '
                         'cut them first')
    padding = seq_len - total
    zeros = np.zeros(padding, np.int32)
    return {
        'tokens': np.concatenate([*(p.tokens for p in segments), zeros]),
        'targets': np.concatenate([*(p.targets for p in segments), zeros]),
        'positions': np.concatenate([*(np.arange(n, dtype=np.int32) for n in lengths),
                                     np.arange(padding, dtype=np.int32)]),
        'segment_ids': np.repeat(np.array([*range(1, len(segments) + 1), 0], np.int32), [*lengths, padding]),
        'loss_mask': np.concatenate([*(p.weights for p in segments), zeros.astype(np.float32)]),
    }


def take_segments(document: Callable[[int], np.ndarray | None], cursor: tuple[int, int], seq_len: int,
                  bos_id: int | None = None,
                  eos_id: int | None = None) -> tuple[list[Segment], tuple[int, int]]:
    """([Segment], cursor after them): the next seq_len tokens of a stream of documents; fewer at its end.

    document: a function index -> ids int [n] (not empty), or None past the end. cursor: (index, offset) of
    the current document and of its next token, its bos included.
    """
    index, offset = cursor
    segments, left = [], seq_len
    while left and (ids := document(index)) is not None:
        end = len(ids) + int(bos_id is not None)
        stop = min(offset + left, end)
        segments.append(segment(ids, None, bos_id, offset, stop, eos_id))
        left -= stop - offset
        index, offset = (index + 1, 0) if stop == end else (index, stop)
    return segments, (index, offset)


def pack_documents(documents: Sequence[Sequence[int] | np.ndarray], seq_len: int,
                   bos_id: int | None = None) -> Iterator[dict[str, np.ndarray]]:
    """Rows for evaluation: every token of documents [ids int [n]] once and in order, the last row padded."""
    documents = [ids for ids in documents if len(ids)]

    def document(index):
        return documents[index] if index < len(documents) else None

    cursor = (0, 0)
    while cursor[0] < len(documents):
        segments, cursor = take_segments(document, cursor, seq_len, bos_id)
        yield pack(segments, seq_len)
