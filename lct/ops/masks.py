"""Who may see whom: the one rule behind every attention op, from positions and segment_ids.

A query sees the keys of its own document at its own position or before, with a sliding window only the last
`window` of them, itself included. Segment 0 is padding: it sees nothing and nobody sees it.
"""

import jax.numpy as jnp

EMPTY, MIXED, FULL = 0, 1, 2


def visible(q_positions, k_positions, q_segments, k_segments, window=None):
    """Boolean mask [..., T, S] from positions and segments [..., T] and [..., S]."""
    distance = q_positions[..., :, None] - k_positions[..., None, :]
    seen = (distance >= 0) & (q_segments[..., :, None] == k_segments[..., None, :])
    if window is not None:
        seen &= distance < window
    return seen & (k_segments[..., None, :] > 0)


def chunk_classes(q_positions, k_positions, q_segments, k_segments, query_chunk, key_chunk, window=None):
    """Class of every chunk pair from the ranges of their positions and segments alone.

    Args:
      q_positions, q_segments: [B, T]; k_positions, k_segments: [B, S].
    Returns:
      int32 [B, T / query_chunk, S / key_chunk]: EMPTY (no pair is visible), FULL (every pair is: no
      mask needed) or MIXED.
    """
    q_pos, q_seg = _chunks(q_positions, query_chunk), _chunks(q_segments, query_chunk)
    k_pos, k_seg = _chunks(k_positions, key_chunk), _chunks(k_segments, key_chunk)
    q_min, q_max = q_pos.min(-1)[:, :, None], q_pos.max(-1)[:, :, None]
    k_min, k_max = k_pos.min(-1)[:, None, :], k_pos.max(-1)[:, None, :]
    qs_min, qs_max = q_seg.min(-1)[:, :, None], q_seg.max(-1)[:, :, None]
    ks_min, ks_max = k_seg.min(-1)[:, None, :], k_seg.max(-1)[:, None, :]
    empty = (q_max < k_min) | (qs_max < ks_min) | (ks_max < qs_min) | (qs_max == 0) | (ks_max == 0)
    one_document = (qs_min == qs_max) & (ks_min == ks_max) & (qs_min == ks_min)
    full = one_document & (q_min >= k_max)
    if window is not None:
        empty |= q_min - k_max >= window
        full &= q_max - k_min < window
    return jnp.where(empty, EMPTY, jnp.where(full, FULL, MIXED)).astype(jnp.int32)


def _chunks(x, chunk):
    return x.reshape(x.shape[0], x.shape[1] // chunk, chunk)
