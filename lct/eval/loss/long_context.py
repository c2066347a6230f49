"""Losses that measure the value of a long context.

They are taken on the same targets with a growing context, on key tokens, next to the borders between devices,
and against the base model on short windows.

Letters: n windows, S tokens of a window. Windows are by_position.EvaluationWindows: tokens int32 [n, S + 1],
which begin with the BOS if the tokenizer has one, and documents [n]; losses come from
by_position.loss_by_position, float32 [n, S]. `loss` is a function from windows [n, s + 1] to losses [n, s].
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from lct.data import layout as layouts
from lct.eval.loss import by_position

ALPHA, BETA = 2.0, 2.0  # nats: a key token gains more than ALPHA from the long context and ends below BETA
TOLERANCE = 0.01  # a context is as good as the longest one if its loss is at most this fraction higher

LossFunction = Callable[[np.ndarray], np.ndarray]


# ---------------------------------------------------------------------------------------------------
# The same targets with a growing context
# ---------------------------------------------------------------------------------------------------


def context_sizes(seq_len: int, targets: int, first: int = 64) -> tuple[int, ...]:
    """(first, 2 * first, ..., seq_len - targets): numbers of tokens before the targets."""
    longest = seq_len - targets
    if targets < 1 or longest < first:
        raise ValueError(f'windows of {seq_len} tokens do not hold {targets} targets behind {first} tokens '
                         'of context; use longer ones')
    return tuple(first << i for i in range((longest - 1).bit_length()) if first << i < longest) + (longest,)


def growing_context(
    loss: LossFunction, windows: np.ndarray, targets: int, sizes: Sequence, bos_id: int | None = None,
) -> np.ndarray:
    """float64 [len(sizes), n]: mean loss of the last `targets` tokens of every window, by context size.

    The model gets no more than `size` tokens before the first target. Unlike a curve over positions, this
    does not depend on which tokens stand late in a text.

    bos_id: the id that every text began with in training; None for a tokenizer without one.
    """
    stop = windows.shape[1]
    cuts = [_cut(windows, stop - size - targets - 1, stop, bos_id) for size in sizes]
    return np.array([loss(cut)[:, -targets:].mean(1, dtype=np.float64) for cut in cuts])


def _cut(windows, start, stop, bos_id):
    """Tokens start:stop of the windows as texts of their own, with the BOS in place of their first token."""
    cut = windows[:, start:stop].copy()
    if bos_id is not None:
        cut[:, 0] = bos_id
    return cut


def effective_context(sizes: Sequence, losses: Sequence) -> int | None:
    """The shortest context whose loss is within TOLERANCE of the longest one's (Khandelwal et al. 2018).

    None where the latter is NaN or infinite.
    """
    if not math.isfinite(losses[-1]):
        return None
    limit = losses[-1] * (1 + TOLERANCE)
    return next(size for size, value in zip(sizes, losses, strict=True) if value <= limit)


# ---------------------------------------------------------------------------------------------------
# Key tokens
# ---------------------------------------------------------------------------------------------------


def short_context_losses(
    loss: LossFunction, windows: np.ndarray, full: np.ndarray, context: int, stride: int,
    bos_id: int | None = None,
) -> np.ndarray:
    """float32 [n, S]: losses given only the last `context` to `context + stride - 1` tokens.

    One forward over context + stride tokens serves stride targets. The first `context` targets keep the loss
    in `full` [n, S].
    """
    seq_len = windows.shape[1] - 1
    if min(context, stride) < 1 or context + stride > seq_len:
        raise ValueError(f'a short context of {context} tokens with strides of {stride} does not fit into '
                         f'windows of {seq_len}; use smaller ones')
    out = full.copy()
    for start in range(context, seq_len, stride):
        start = min(start, seq_len - stride)  # the last one overlaps where stride does not divide
        cut = _cut(windows, start - context, start + stride + 1, bos_id)
        out[:, start:start + stride] = loss(cut)[:, context:]
    return out


def key_tokens(full: np.ndarray, short: np.ndarray) -> np.ndarray:
    """bool [n, S]: the tokens whose prediction needs the long context.

    Fang et al. 2024, "What is Wrong with Perplexity for Long-context Language Modeling?". The model that
    finds them may differ from the model that is scored.
    """
    return (short - full > ALPHA) & (full < BETA)


def long_ppl(losses: np.ndarray, key: np.ndarray) -> float:
    """exp of the mean loss on key tokens; NaN where there are none."""
    return math.exp(losses[key].mean(dtype=np.float64)) if key.any() else math.nan


# ---------------------------------------------------------------------------------------------------
# Borders between devices
# ---------------------------------------------------------------------------------------------------


def border_distance(layout: str, seq_len: int, ring_size: int) -> np.ndarray:
    """int [S]: tokens from each position to the nearest border between devices.

    A border lies where the next position is on another device; the distance is 0 on both sides of it. The
    loss of a correctly sharded model does not depend on it.
    """
    slots = np.argsort(layouts.permutation(layout, seq_len, ring_size))
    device = slots // (seq_len // ring_size)
    borders = np.flatnonzero(np.diff(device))  # between p and p + 1
    if ring_size < 2 or len(borders) > seq_len // 4:
        raise ValueError(f'the layout {layout} over {ring_size} devices has {len(borders)} borders in '
                         f'{seq_len} tokens; use contiguous or zigzag and two devices or more')
    positions = np.arange(seq_len)
    return np.minimum(np.abs(positions[:, None] - borders), np.abs(positions[:, None] - borders - 1)).min(1)


def bin_by_distance(
    losses: np.ndarray, distance: np.ndarray, documents: Sequence | None = None,
) -> by_position.LossBins:
    """LossBins over distance 0, 1, 2-3, 4-7, ..."""
    edges = [0, 1]
    while edges[-1] <= distance.max():
        edges.append(2 * edges[-1])
    spans = list(zip(edges[:-1], edges[1:], strict=True))
    means = [losses[:, (distance >= low) & (distance < high)].mean(1, dtype=np.float64)
             for low, high in spans]
    return by_position.bin_means(edges, means, documents)


# ---------------------------------------------------------------------------------------------------
# Against the base model
# ---------------------------------------------------------------------------------------------------


def regression(extended: Sequence, base: Sequence, documents: Sequence) -> dict:
    """The cost of an extension within the context of the base model.

    extended, base: mean losses [n] of the same short windows.

    Returns:
      a dict of both means, their difference (above 0 is worse) and its standard error over documents.
    """
    extended, base = np.asarray(extended, float), np.asarray(base, float)
    mean, error = by_position.mean_over_documents(np.stack([extended, base, extended - base]), documents)
    return {'extended': float(mean[0]), 'base': float(mean[1]), 'difference': float(mean[2]),
            'stderr': float(error[2]), 'num_windows': len(base), 'documents': len(set(documents))}
