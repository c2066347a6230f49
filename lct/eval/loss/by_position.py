"""Loss by position: how much better is a token predicted the more text stands before it.

Every window is one stretch of one held-out document, so all positions are averaged over the same text.
"""

import dataclasses
import functools
import json

import jax
import numpy as np

from lct import sharding
from lct.data import layout as layouts
from lct.models import decode, llama
from lct.ops import rope
from lct.ops.cross_entropy import cross_entropy


@dataclasses.dataclass(frozen=True)
class Bins:
    """Mean loss (nats per token) of positions edges[i] <= p < edges[i + 1], and its standard error over
    documents (NaN for a single one), as over_documents says."""

    edges: tuple  # [n + 1]
    mean: np.ndarray  # [n]
    stderr: np.ndarray  # [n]
    num_windows: int
    documents: int  # that the windows come from

    def to_dict(self):
        """Plain lists and numbers for JSON."""
        error = [None if np.isnan(x) else float(x) for x in self.stderr]
        return {'edges': list(self.edges), 'mean': self.mean.tolist(), 'stderr': error,
                'num_windows': self.num_windows, 'documents': self.documents}

    def to_json(self):
        """JSON text; from_json reads it back."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text):
        fields = json.loads(text)
        if 'documents' not in fields:
            raise ValueError("a kept loss by position has no field 'documents': it is of windows that are drawn in another "
                             'way now; remove its file to measure it again')
        error = np.array([np.nan if x is None else x for x in fields['stderr']])
        return cls(tuple(fields['edges']), np.array(fields['mean']), error, fields['num_windows'], fields['documents'])


def windows(documents, seq_len, count, seed, bos_id=None, rotations=1):
    """Random stretches of documents that are long enough, none across two documents.

    Each stretch gives `rotations` windows that begin at even steps within it and run over its end into its
    beginning. So the same tokens stand at every position, with little context and with much: a curve over
    positions then shows what the context is worth, and not which tokens happen to stand late in a file.
    Long enough documents come in a random order, and none comes again before all have come. Window i depends on
    the seed and on i alone, so more windows are the same ones and some after them.

    Args:
      documents: lists or arrays of token ids.
      count: windows in all, a multiple of rotations.
      bos_id: put at position 0 of every window, as in training, if the tokenizer has one.
    Returns:
      (int32 [count, seq_len + 1]: inputs are [:, :-1], targets [:, 1:];
       int [count]: which document each window comes from)
    """
    if rotations < 1 or count % rotations:
        raise ValueError(f'{count} windows are not a multiple of {rotations} rotations; use for example '
                         f'{-(-count // max(rotations, 1)) * max(rotations, 1)}')
    if seq_len < 1 or count < 1:
        raise ValueError(f'seq_len {seq_len} and count {count} must both be at least 1')
    needed = seq_len + 1 - (bos_id is not None)
    sizes = np.array([len(document) for document in documents], np.int64)
    fitting = np.flatnonzero(sizes >= needed)
    if not len(fitting):
        longest = sizes.max(initial=0)
        raise ValueError(
            f'none of the {len(sizes)} held-out documents has the {needed} tokens of a window: the longest has '
            f'{longest}; use a seq_len up to {max(longest - needed + seq_len, 1)} or longer documents'
        )
    stretches = count // rotations
    rounds = range(-(-stretches // len(fitting)))
    orders = [np.random.default_rng([seed, 0, i]).permutation(fitting) for i in rounds]
    chosen = np.concatenate(orders)[:stretches]
    out = np.full((count, seq_len + 1), 0 if bos_id is None else bos_id, np.int32)
    groups = out[:, seq_len + 1 - needed:].reshape(stretches, rotations, needed)
    for i, (group, source) in enumerate(zip(groups, chosen, strict=True)):
        start = np.random.default_rng([seed, 1, i]).integers(sizes[source])
        stretch = np.take(documents[source], np.arange(start, start + needed), mode='wrap')
        for turn, window in enumerate(group):
            window[:] = np.roll(stretch, -(turn * needed // rotations))
    out[:, seq_len + 1 - needed:] = groups.reshape(count, needed)
    return out, chosen.repeat(rotations)


def check(seq_len, ring_size=1, ffn_chunks=1):
    """Refuse windows of seq_len tokens that do not divide over the ring or into FFN pieces."""
    unit = decode.length_unit(ring_size, ffn_chunks)
    if seq_len < 1 or seq_len % unit:
        raise ValueError(
            f'windows of {seq_len} tokens do not divide into 2 * ring_size = {2 * ring_size} stretches and '
            f'ring_size * ffn_chunks = {ring_size * ffn_chunks} pieces; use a multiple of {unit}, for '
            f'example {max(seq_len // unit, 1) * unit}'
        )


def loss_by_position(params, config, windows, *, layout='zigzag', memory=None, batch_size=1, progress=None):
    """The loss of every token on the current mesh; no [B, T, V] exists.

    Args:
      windows: int [n, seq_len + 1], the first of what windows() gives.
      batch_size: windows computed at a time; the last batch is padded to it.
      progress: called as progress(done, total) after every batch.
    Returns:
      numpy float32 [n, seq_len]: entry p is the loss of token p + 1 given the tokens 0..p.
    """
    windows, memory = np.asarray(windows), memory or llama.Memory(remat='none')
    num_windows, seq_len = windows.shape[0], windows.shape[1] - 1
    check(seq_len, sharding.axis_size('sequence'), memory.ffn_chunks)
    decode.check_ids(windows, config.vocab_size)
    windows = windows.astype(np.int32)
    indices = layouts.permutation(layout, seq_len, sharding.axis_size('sequence'))
    rows = sharding.axis_size('data') * sharding.axis_size('fsdp')
    batch_size = -(-min(batch_size, num_windows) // rows) * rows
    tables = rope.make_tables(config.rope, config.head_dim, seq_len)
    losses = np.empty((num_windows, seq_len), np.float32)
    positions = np.tile(indices.astype(np.int32), (batch_size, 1))
    for start in range(0, num_windows, batch_size):
        chosen = np.minimum(np.arange(start, start + batch_size), num_windows - 1)
        real = np.minimum(batch_size, num_windows - start)
        batch = {
            'tokens': windows[chosen, :-1][:, indices],
            'targets': windows[chosen, 1:][:, indices],
            'positions': positions,
        }
        batch = {name: sharding.put(x, sharding.spec('BT')) for name, x in batch.items()}
        got = _losses(params, config.architecture(), batch, tables, memory)
        losses[start:start + real, indices] = sharding.fetch(got)[:real]
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


def doubling_edges(seq_len, first=64):
    """(0, first, 2 * first, ..., seq_len)."""
    edges = [0]
    while edges[-1] < seq_len:
        edges.append(min(2 * edges[-1] or first, seq_len))
    return tuple(edges)


def bins(losses, edges=None, sources=None):
    """Bins of losses [n, T]; edges default to doubling_edges(T), sources are as in binned."""
    seq_len = losses.shape[1]
    edges = doubling_edges(seq_len) if edges is None else tuple(int(edge) for edge in edges)
    if len(edges) < 2 or edges[0] < 0 or edges[-1] > seq_len or (np.diff(edges) < 1).any():
        raise ValueError(f'edges {edges} must increase within 0..{seq_len}, the length of the windows')
    spans = zip(edges[:-1], edges[1:], strict=True)
    return binned(edges, [losses[:, lo:hi].mean(1, dtype=np.float64) for lo, hi in spans], sources)


def binned(edges, values, sources=None):
    """Bins of the mean losses [bins, n] of n windows; sources: [n] their documents, by default one for each."""
    values = np.asarray(values)
    sources = range(values.shape[1]) if sources is None else sources
    return Bins(tuple(edges), *over_documents(values, sources), values.shape[1], len(set(sources)))


def over_documents(values, sources):
    """(mean, standard error) [m], [m] of values [m, n] whose columns come from the documents sources [n].

    Windows of one document are alike, so its mean counts as one observation: many windows of few documents say
    little about others. The error is NaN for a single document.
    """
    sources = np.asarray(sources)
    units = np.stack([values[:, sources == one].mean(1) for one in np.unique(sources)], 1)
    count = units.shape[1]
    error = units.std(1, ddof=1) / count**0.5 if count > 1 else np.full(len(units), np.nan)
    return units.mean(1), error


def ratio_over_documents(sums, counts, sources):
    """(sums / counts, standard error, documents with counts) [m] each of totals [m, n] whose columns come from the
    documents sources [n]: means of tokens of which a document has many or few (Cochran 1977, Sampling Techniques,
    section 6.3). NaN where nothing is counted, and the error also where only one document is. Where one document
    holds most of what is counted, the error is too small.
    """
    sources = np.asarray(sources)
    sums, counts = (np.stack([x[:, sources == one].sum(1) for one in np.unique(sources)], 1).astype(float)
                    for x in (np.asarray(sums), np.asarray(counts)))
    known = (counts > 0).sum(1)
    with np.errstate(invalid='ignore', divide='ignore'):
        ratio = sums.sum(1) / counts.sum(1)
        spread = ((sums - ratio[:, None] * counts) ** 2).sum(1)
        error = np.where(known > 1, np.sqrt(known / (known - 1) * spread) / counts.sum(1), np.nan)
    return ratio, error, known
