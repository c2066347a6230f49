"""The attention mask: one rule for every attention op, from positions and segment ids.

A query attends to the keys of its own document at its own position or before; with a sliding window, to the
last `window` of them, itself included. Segment 0 is padding: it neither attends nor is attended to.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

EMPTY, MIXED, FULL = 0, 1, 2


class Tokens(NamedTuple):
    """The properties of a sequence of tokens on which its mask depends."""

    positions: jax.Array  # int32 [..., T], counted within the document
    segment_ids: jax.Array  # int32 [..., T], one number per document of a row; 0 is padding


def attention_mask(q_tokens: Tokens, k_tokens: Tokens, window: int | None = None) -> jax.Array:
    """bool [..., T, S] of queries [..., T] and keys [..., S]: True where the query attends to the key."""
    distance = q_tokens.positions[..., :, None] - k_tokens.positions[..., None, :]
    mask = (distance >= 0) & (q_tokens.segment_ids[..., :, None] == k_tokens.segment_ids[..., None, :])
    if window is not None:
        mask &= distance < window
    return mask & (k_tokens.segment_ids[..., None, :] > 0)


def chunk_classes(
    q_tokens: Tokens, k_tokens: Tokens, query_chunk: int, key_chunk: int, window: int | None = None
) -> jax.Array:
    """Class of every chunk pair, from the ranges of their positions and segments alone.

    Args:
      q_tokens: [B, T]; k_tokens: [B, S].
    Returns:
      int32 [B, T / query_chunk, S / key_chunk]: EMPTY (the mask is all False), FULL (all True: no mask is
      needed) or MIXED.
    """
    q_pos, q_seg = (_chunks(x, query_chunk) for x in q_tokens)
    k_pos, k_seg = (_chunks(x, key_chunk) for x in k_tokens)
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
