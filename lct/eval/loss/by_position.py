"""Loss by position: how much better a token is predicted as the context before it grows.

Letters: n windows, S tokens of a window, m bins.
"""

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from lct import sharding
from lct.data import layout as layouts
from lct.models import llama, prompt_layout
from lct.ops import rope
from lct.ops.cross_entropy import cross_entropy


@dataclasses.dataclass(frozen=True)
class LossBins:
    """Mean loss (nats per token) of positions edges[i] <= p < edges[i + 1].

    The standard error is over documents (NaN for a single document), computed as in mean_over_documents.
    """

    edges: tuple  # [m + 1]
    mean: np.ndarray  # [m]
    stderr: np.ndarray  # [m]
    num_windows: int
    documents: int  # number of distinct documents that the windows come from

    def to_dict(self) -> dict:
        """Plain lists and numbers for JSON."""
        error = [None if np.isnan(x) else float(x) for x in self.stderr]
        return {'edges': list(self.edges), 'mean': self.mean.tolist(), 'stderr': error,
                'num_windows': self.num_windows, 'documents': self.documents}

    def to_json(self) -> str:
        """JSON text that from_json reads."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> 'LossBins':
        fields = json.loads(text)
        if 'documents' not in fields:
            raise ValueError("a saved loss by position has no field 'documents': an earlier version wrote "
                             'it, which drew its windows differently; remove its file to measure it again')
        error = np.array([np.nan if x is None else x for x in fields['stderr']])
        return cls(tuple(fields['edges']), np.array(fields['mean']), error, fields['num_windows'],
                   fields['documents'])


class EvaluationWindows(NamedTuple):
    """Windows of text with their sources.

    tokens: int32 [n, S + 1], of which [:, :-1] are the inputs and [:, 1:] the targets.
    documents: int [n], the index of the document that each window comes from.
    """

    tokens: np.ndarray
    documents: np.ndarray


def evaluation_windows(
    documents: Sequence, seq_len: int, count: int, seed: int, bos_id: int | None = None, rotations: int = 1,
) -> EvaluationWindows:
    """Random spans of the documents that are long enough. No window crosses from one document into another.

    Each span gives `rotations` windows, which start at even steps within it and wrap around its end. The same
    tokens therefore stand at every position, once with little context and once with much, and a curve over
    positions shows the value of context rather than which tokens tend to stand late in a file.
    Documents come in random order, and each comes once before any comes again. Window i depends only on the
    seed and i, so a larger count extends a smaller one.

    Args:
      documents: lists or arrays of token ids.
      count: total number of windows, a multiple of rotations.
      bos_id: id at position 0 of every window, as in training; None for a tokenizer without one.
    Raises:
      ValueError: if count is not a multiple of rotations, or no document is long enough.
    """
    if rotations < 1 or count % rotations:
        raise ValueError(f'{count} windows are not a multiple of {rotations} rotations; use for example '
                         f'{-(-count // max(rotations, 1)) * max(rotations, 1)}')
    if seq_len < 1 or count < 1:
        raise ValueError(f'seq_len {seq_len} and count {count} must both be at least 1')
    needed = seq_len + 1 - (bos_id is not None)
    num_spans = count // rotations
    chosen = _choose_documents(documents, needed, seq_len, num_spans, seed)
    out = np.full((count, seq_len + 1), 0 if bos_id is None else bos_id, np.int32)
    groups = out[:, seq_len + 1 - needed:].reshape(num_spans, rotations, needed)
    for i, (group, document) in enumerate(zip(groups, chosen, strict=True)):
        start = np.random.default_rng([seed, 1, i]).integers(len(documents[document]))
        span = np.take(documents[document], np.arange(start, start + needed), mode='wrap')
        for rotation, window in enumerate(group):
            window[:] = np.roll(span, -(rotation * needed // rotations))
    out[:, seq_len + 1 - needed:] = groups.reshape(count, needed)
    return EvaluationWindows(out, chosen.repeat(rotations))


def _choose_documents(documents, needed, seq_len, count, seed):
    """int [count]: indices of documents of at least `needed` tokens, each once before any repeats. No more
    documents are read than it takes."""
    if not len(documents):
        raise ValueError('there is no held-out document to evaluate on; hold out a larger fraction of the '
                         'corpus')
    chosen, longest = [], 0
    for turn in itertools.count():
        for i in np.random.default_rng([seed, 0, turn]).permutation(len(documents)):
            longest = max(longest, len(documents[i]))
            if len(documents[i]) >= needed:
                chosen.append(i)
            if len(chosen) == count:
                return np.array(chosen)
        if not chosen:
            raise ValueError(
                f'none of the {len(documents)} held-out documents has the {needed} tokens of a window: the '
                f'longest has {longest}; use a seq_len up to {max(longest - needed + seq_len, 1)} or longer '
                'documents')


def check_window_length(seq_len: int, ring_size: int = 1, ffn_chunks: int = 1) -> None:
    """Raise ValueError for windows of seq_len tokens that do not divide over the ring or into FFN chunks."""
    unit = prompt_layout.length_unit(ring_size, ffn_chunks)
    if seq_len < 1 or seq_len % unit:
        raise ValueError(
            f'windows of {seq_len} tokens do not divide into 2 * ring_size = {2 * ring_size} layout blocks '
            f'and ring_size * ffn_chunks = {ring_size * ffn_chunks} FFN chunks; use a multiple of {unit}, '
            f'for example {max(seq_len // unit, 1) * unit}'
        )


def loss_by_position(
    params: llama.Params, config: llama.LlamaConfig, windows: np.ndarray, *, layout: str = 'zigzag',
    memory: llama.Memory | None = None, batch_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """The loss of every token, computed on the current mesh without an array [B, T, V].

    Args:
      windows: int [n, S + 1], EvaluationWindows.tokens.
      batch_size: windows computed at a time; the last batch is padded to it.
      progress: called as progress(done, total) after every batch.
    Returns:
      float32 [n, S]: entry p is the loss of token p + 1 given the tokens 0..p.
    """
    windows, memory = np.asarray(windows), memory or llama.Memory(remat='none')
    num_windows, seq_len = windows.shape[0], windows.shape[1] - 1
    check_window_length(seq_len, sharding.axis_size('sequence'), memory.ffn_chunks)
    prompt_layout.check_ids(windows, config.vocab_size)
    windows = windows.astype(np.int32)
    indices = layouts.permutation(layout, seq_len, sharding.axis_size('sequence'))
    replicas = sharding.axis_size('data') * sharding.axis_size('fsdp')
    batch_size = -(-min(batch_size, num_windows) // replicas) * replicas
    tables = rope.make_tables(config.rope, config.head_dim, seq_len)
    losses = np.empty((num_windows, seq_len), np.float32)
    positions = np.tile(indices.astype(np.int32), (batch_size, 1))
    for start in range(0, num_windows, batch_size):
        rows = np.minimum(np.arange(start, start + batch_size), num_windows - 1)
        real = np.minimum(batch_size, num_windows - start)
        batch = {
            'tokens': windows[rows, :-1][:, indices],
            'targets': windows[rows, 1:][:, indices],
            'positions': positions,
        }
        batch = {name: sharding.put(x, sharding.spec('BT')) for name, x in batch.items()}
        batch_losses = _losses(params, config.architecture(), batch, tables, memory)
        losses[start:start + real, indices] = sharding.fetch(batch_losses)[:real]
        if progress is not None:
            progress(start + real, num_windows)
    return losses


@functools.partial(jax.jit, static_argnames=('config', 'memory'))
def _losses(params, config, batch, tables, memory):
    positions = batch['positions']
    one_document = jax.numpy.ones_like(positions)
    x = llama.hidden_states(params, config, batch['tokens'], positions, one_document, tables, memory)
    mask = one_document.astype(jax.numpy.float32)
    return cross_entropy(x, llama.head(params), batch['targets'], mask, memory.loss_chunk)


# ---------------------------------------------------------------------------------------------------
# Means and their errors
# ---------------------------------------------------------------------------------------------------


def doubling_edges(seq_len: int, first: int = 64) -> tuple:
    """(0, first, 2 * first, ..., seq_len)."""
    edges = [0]
    while edges[-1] < seq_len:
        edges.append(min(2 * edges[-1] or first, seq_len))
    return tuple(edges)


def bin_losses(
    losses: np.ndarray, edges: Sequence | None = None, documents: Sequence | None = None,
) -> LossBins:
    """LossBins of losses [n, S]; edges default to doubling_edges(S), documents [n] to one for each window."""
    seq_len = losses.shape[1]
    edges = doubling_edges(seq_len) if edges is None else tuple(int(edge) for edge in edges)
    if len(edges) < 2 or edges[0] < 0 or edges[-1] > seq_len or (np.diff(edges) < 1).any():
        raise ValueError(f'edges {edges} must increase within 0..{seq_len}, the length of the windows')
    spans = zip(edges[:-1], edges[1:], strict=True)
    return bin_means(edges, [losses[:, lo:hi].mean(1, dtype=np.float64) for lo, hi in spans], documents)


def bin_means(edges: Sequence, means: Sequence, documents: Sequence | None = None) -> LossBins:
    """LossBins of the mean losses [m, n] of n windows; documents [n] default to one for each window."""
    means = np.asarray(means)
    documents = range(means.shape[1]) if documents is None else documents
    return LossBins(tuple(edges), *mean_over_documents(means, documents), means.shape[1], len(set(documents)))


def mean_over_documents(values: np.ndarray, documents: Sequence) -> tuple[np.ndarray, np.ndarray]:
    """(mean, standard error), each [m], of values [m, n] whose columns come from the documents [n].

    Windows of one document are correlated, so the mean of a document counts as one observation: many windows
    of few documents say little about others. The error is NaN for a single document.
    """
    documents = np.asarray(documents)
    units = np.stack([values[:, documents == one].mean(1) for one in np.unique(documents)], 1)
    count = units.shape[1]
    error = units.std(1, ddof=1) / count**0.5 if count > 1 else np.full(len(units), np.nan)
    return units.mean(1), error


def ratio_over_documents(
    sums: np.ndarray, counts: np.ndarray, documents: Sequence,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ratio estimate of a mean over tokens, of which documents hold different numbers.

    The method is in Cochran 1977, Sampling Techniques, section 6.3.

    Args:
      sums, counts: [m, n], totals of n windows that come from the documents [n].
    Returns:
      (sums / counts, its standard error, number of documents with counts), each [m]. The ratio is NaN where
      nothing is counted; the error is NaN also where only one document is. The error is too small where one
      document holds most of the counted tokens.
    """
    documents = np.asarray(documents)
    sums, counts = (np.stack([x[:, documents == one].sum(1) for one in np.unique(documents)], 1).astype(float)
                    for x in (np.asarray(sums), np.asarray(counts)))
    known = (counts > 0).sum(1)
    with np.errstate(invalid='ignore', divide='ignore'):
        ratio = sums.sum(1) / counts.sum(1)
        spread = ((sums - ratio[:, None] * counts) ** 2).sum(1)
        error = np.where(known > 1, np.sqrt(known / (known - 1) * spread) / counts.sum(1), np.nan)
    return ratio, error, known
