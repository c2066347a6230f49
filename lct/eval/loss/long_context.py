"""Losses that say what a long context is worth: on the same targets with more and more of it, on the tokens that
need it, next to the borders between devices, and beside the base model where the context is short.

Letters: n windows, S tokens of a window. Windows are those of perplexity.windows: int32 [n, S + 1], the BOS first if
the tokenizer has one, and sources [n] are their documents; losses are those of perplexity.loss_by_position, float32 [n, S].
"""

import math

import numpy as np

from lct.data import layout as layouts
from lct.eval.loss import by_position

ALPHA, BETA = 2.0, 2.0  # nats: a key token gains more than ALPHA by the long context and ends below BETA
SAME = 0.01  # a context reads as well as the longest one if its loss is at most this fraction above


# ---------------------------------------------------------------------------------------------------
# The same targets, more and more context
# ---------------------------------------------------------------------------------------------------


def contexts(seq_len, targets, first=64):
    """(first, 2 * first, ..., seq_len - targets): tokens before the targets."""
    longest = seq_len - targets
    if targets < 1 or longest < first:
        raise ValueError(f'windows of {seq_len} tokens do not hold {targets} targets behind {first} tokens of context; '
                         'use longer ones')
    return tuple(first << i for i in range((longest - 1).bit_length()) if first << i < longest) + (longest,)


def growing_context(loss, windows, targets, sizes, bos_id=None):
    """float64 [len(sizes), n]: the mean loss of the last `targets` tokens of every window, read with no more than so
    many tokens before the first of them. It removes what a curve over positions cannot: that other tokens stand
    late in a text than early.

    loss: windows [n, s + 1] -> losses [n, s], for s = size + targets of every size. bos_id: what every text began with
    in training, if the tokenizer has one.
    """
    stop = windows.shape[1]
    cuts = [_cut(windows, stop - size - targets - 1, stop, bos_id) for size in sizes]
    return np.array([loss(cut)[:, -targets:].mean(1, dtype=np.float64) for cut in cuts])


def _cut(windows, start, stop, bos_id):
    """A part of the windows as if it were a text, the BOS in place of its first token."""
    cut = windows[:, start:stop].copy()
    if bos_id is not None:
        cut[:, 0] = bos_id
    return cut


def effective_context(sizes, losses):
    """The shortest context whose loss is within SAME of the longest one's (Khandelwal et al. 2018); None where that is
    NaN or infinite."""
    if not math.isfinite(losses[-1]):
        return None
    return next(size for size, value in zip(sizes, losses, strict=True) if value <= losses[-1] * (1 + SAME))


# ---------------------------------------------------------------------------------------------------
# Key tokens
# ---------------------------------------------------------------------------------------------------


def short_losses(loss, windows, full, context, stride, bos_id=None):
    """float32 [n, S]: the losses given only the last `context` tokens or up to `stride` - 1 more: one forward over
    context + stride tokens serves stride targets. Targets with no more than that before them keep their `full` one.
    """
    seq_len = windows.shape[1] - 1
    if min(context, stride) < 1 or context + stride > seq_len:
        raise ValueError(f'a short context of {context} tokens with strides of {stride} does not fit into windows of '
                         f'{seq_len}; use smaller ones')
    out = full.copy()
    for start in range(context, seq_len, stride):
        start = min(start, seq_len - stride)  # the last one overlaps where stride does not divide
        cut = _cut(windows, start - context, start + stride + 1, bos_id)
        out[:, start:start + stride] = loss(cut)[:, context:]
    return out


def key_tokens(full, short):
    """bool [n, S]: the tokens that a long context makes known (Fang et al. 2024, "What is Wrong with Perplexity for
    Long-context Language Modeling?"). The model that finds them may be another than the one that is scored."""
    return (short - full > ALPHA) & (full < BETA)


def long_ppl(losses, key):
    """exp of the mean loss on key tokens; NaN where there are none."""
    return math.exp(losses[key].mean(dtype=np.float64)) if key.any() else math.nan


# ---------------------------------------------------------------------------------------------------
# Borders between devices
# ---------------------------------------------------------------------------------------------------


def border_distance(layout, seq_len, ring_size):
    """int [S]: tokens from each position to the nearest border, where the next position is another device's: 0 on
    both sides of it. A model that is sharded right knows nothing of borders."""
    slots = np.argsort(layouts.permutation(layout, seq_len, ring_size))
    device = slots // (seq_len // ring_size)
    borders = np.flatnonzero(np.diff(device))  # between p and p + 1
    if ring_size < 2 or len(borders) > seq_len // 4:
        raise ValueError(f'the layout {layout} over {ring_size} devices has {len(borders)} borders in {seq_len} tokens; '
                         'use contiguous or zigzag and two devices or more')
    positions = np.arange(seq_len)
    return np.minimum(np.abs(positions[:, None] - borders), np.abs(positions[:, None] - borders - 1)).min(1)


def by_distance(losses, distance, sources=None):
    """perplexity.Bins over distance 0, 1, 2-3, 4-7, ..."""
    edges = [0, 1]
    while edges[-1] <= distance.max():
        edges.append(2 * edges[-1])
    spans = list(zip(edges[:-1], edges[1:], strict=True))
    means = [losses[:, (distance >= low) & (distance < high)].mean(1, dtype=np.float64) for low, high in spans]
    return by_position.binned(edges, means, sources)


# ---------------------------------------------------------------------------------------------------
# Beside the base model
# ---------------------------------------------------------------------------------------------------


def regression(extended, base, sources):
    """What an extension costs where the base could read already, from the mean losses [n] of the same short windows:
    a dict of both means, their difference (above 0 is worse) and the error of that difference over documents."""
    extended, base = np.asarray(extended, float), np.asarray(base, float)
    mean, error = by_position.over_documents(np.stack([extended, base, extended - base]), sources)
    return {'extended': float(mean[0]), 'base': float(mean[1]), 'difference': float(mean[2]), 'stderr': float(error[2]),
            'num_windows': len(base), 'documents': len(set(sources))}
