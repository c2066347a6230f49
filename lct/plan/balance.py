"""Balance of causal attention over a ring: counts of pairs and tiles per device, not times."""

import numpy as np

from lct.data.layout import permutation
from lct.ops.blockwise_attention import fit
from lct.ops.masks import EMPTY, Tokens, chunk_classes


def pairs_by_step(layout: str, seq_len: int, ring_size: int) -> np.ndarray:
    """Causal query-key pairs of one document on each device at each ring step: int [devices, steps].

    At step r device i holds the block of device (i - r) % ring_size. All devices wait for the busiest one at
    every step, so a ring takes pairs.max(0).sum(), and pairs.sum() / ring_size if the work is shared evenly.
    """
    tokens = np.sort(permutation(layout, seq_len, ring_size).reshape(ring_size, -1))
    pairs = lambda i, j: np.searchsorted(tokens[j], tokens[i], 'right').sum()
    return np.array([[pairs(i, (i - r) % ring_size) for r in range(ring_size)] for i in range(ring_size)])


def tiles(layout: str, ring_size: int, positions: np.ndarray, segments: np.ndarray, chunk: int) -> np.ndarray:
    """Attention tiles (chunk pairs that are not skipped) of each device for one row: int [ring_size].

    positions, segments: int [S], in the order of the text. chunk: tokens of a side of a tile.
    """
    order = permutation(layout, len(positions), ring_size)
    shards = lambda x: x[order].reshape(ring_size, 1, -1).astype(np.int32)
    tokens = [Tokens(*shard) for shard in zip(shards(positions), shards(segments))]
    size = fit(chunk, positions.shape[-1])
    count = lambda i, j: np.asarray(chunk_classes(tokens[i], tokens[j], size, size) > EMPTY).sum()
    return np.array([sum(count(i, j) for j in range(ring_size)) for i in range(ring_size)])


def one_document(length: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions and segments [S] of a row with one document."""
    return np.arange(length), np.ones(length, int)


def packed_documents(length: int, median: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions and segments [S] of a row of documents with log-normal lengths (sigma 1)."""
    rng = np.random.default_rng(seed)
    lengths, left = [], length
    while left:
        lengths.append(min(max(1, int(rng.lognormal(np.log(median)))), left))
        left -= lengths[-1]
    return np.concatenate([np.arange(n) for n in lengths]), np.repeat(np.arange(1, len(lengths) + 1), lengths)
