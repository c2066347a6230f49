"""Blockwise attention on one device (Rabe & Staats 2021; Liu & Abbeel 2023; Dao 2023 for the backward).

The contract of every inner block: (q, k, v, positions, segments) -> (out, lse), float32 and un-rounded,
lse the natural log-sum-exp. Nothing larger than one chunk pair of scores exists, pairs that cannot see
each other are skipped, and pairs that see each other whole build no mask.

A tile holds one key/value head: the G query heads that share it lie in the rows, so that one chunk of
keys serves G * query_chunk rows and the scores stay in the cache of a core.
"""

import dataclasses
import math

import jax.numpy as jnp
from jax import lax

from lct.ops.masks import chunk_classes, visible

NOTHING = -1e30  # lse of a row that has seen no key: finite, so that merging needs no guard
LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Chunks:
    """Tokens of queries and keys that one tile works on."""

    query: int = 256
    key: int = 256

    def __post_init__(self):
        if min(self.query, self.key) < 1:
            raise ValueError(f'attention chunks must be positive, got query {self.query}, key {self.key}')


def fit(chunk, length):
    """The largest size <= chunk that divides length, and its half if it has one: a zigzag shard is two
    stretches of the sequence, and a chunk with a foot in both can neither be skipped nor go unmasked."""
    stretch = length // 2 if length % 2 == 0 else length
    size = min(chunk, stretch)
    while stretch % size:
        size -= 1
    return size


def merge(left, right):
    """Combine two partial results (out [..., H], lse [...]) over disjoint keys."""
    (out_l, lse_l), (out_r, lse_r) = left, right
    top = jnp.maximum(lse_l, lse_r)
    weight_l, weight_r = jnp.exp(lse_l - top), jnp.exp(lse_r - top)
    total = weight_l + weight_r
    out = (out_l * weight_l[..., None] + out_r * weight_r[..., None]) / total[..., None]
    return out, top + jnp.log(total)


class _Tiles:
    """Slicing of one attention call into (batch row, key/value head, chunk) tiles."""

    def __init__(self, q, k, q_positions, k_positions, q_segments, k_segments, chunks):
        self.batch, self.q_len, heads, self.head_dim = q.shape
        self.k_len, self.kv_heads = k.shape[1:3]
        self.group = heads // self.kv_heads
        self.cq, self.ck = fit(chunks.query, self.q_len), fit(chunks.key, self.k_len)
        self.nq, self.nk = self.q_len // self.cq, self.k_len // self.ck
        self.rows = self.cq * self.group
        self.dtype = jnp.promote_types(q.dtype, jnp.float32)
        # float32 means float32 on every device; rounded inputs gain nothing from it
        self.precision = lax.Precision.HIGHEST if q.dtype == self.dtype else lax.Precision.DEFAULT
        self.where = (q_positions, k_positions, q_segments, k_segments)
        self.classes = chunk_classes(*self.where, self.cq, self.ck)

    def grouped(self, x):
        """[B, T, N, ...] -> [B, T, K, G, ...]."""
        return x.reshape(*x.shape[:2], self.kv_heads, self.group, *x.shape[3:])

    def query(self, x, b, h, i):
        """Chunk i of grouped x [B, T, K, G, ...] as [rows, ...]."""
        start = (b, i * self.cq, h) + (0,) * (x.ndim - 3)
        tile = lax.dynamic_slice(x, start, (1, self.cq, 1, self.group, *x.shape[4:]))
        return tile.reshape(self.rows, *x.shape[4:]).astype(self.dtype)

    def key(self, x, b, h, j):
        """Chunk j of x [B, S, K, H] as [key_chunk, H]."""
        tile = lax.dynamic_slice(x, (b, j * self.ck, h, 0), (1, self.ck, 1, self.head_dim))
        return tile[0, :, 0].astype(self.dtype)

    def mask(self, b, i, j):
        """Boolean [rows, key_chunk]."""
        q_pos, k_pos, q_seg, k_seg = self.where
        cut = lambda x, n, size: lax.dynamic_slice(x, (b, n * size), (1, size))[0]
        seen = visible(cut(q_pos, i, self.cq), cut(k_pos, j, self.ck), cut(q_seg, i, self.cq),
                       cut(k_seg, j, self.ck))
        return jnp.repeat(seen, self.group, axis=0)

    def dot(self, x, y, contract):
        """Matmul of two tiles over one dim of each, accumulated in float32."""
        return lax.dot_general(x, y, (contract, ((), ())), self.precision, preferred_element_type=self.dtype)

    def spans(self, axis):
        """First and one past the last non-empty chunk along an axis of classes [B, nq, nk]."""
        busy = self.classes > 0
        count = busy.shape[axis]
        first = jnp.argmax(busy, axis)
        last = count - jnp.argmax(jnp.flip(busy, axis), axis)
        return first, jnp.where(busy.any(axis), last, first)


def _by_class(kind, mask, carry, tile):
    """tile(carry, mask or None) as the class of the chunk pair asks: skipped, masked or whole."""
    return lax.switch(
        kind, (lambda c: c, lambda c: tile(c, mask()), lambda c: tile(c, None)), carry
    )


def attend(q, k, v, q_positions, k_positions, q_segments, k_segments, chunks):
    """Attention of q to one block of keys and values.

    Args:
      q: [B, T, N, H]; k, v: [B, S, K, H]; positions and segments int32 [B, T] and [B, S].
      chunks: Chunks.
    Returns:
      out [B, T, N, H] and lse [B, T, N] in float32; lse is NOTHING where no key is visible.
    """
    tiles = _Tiles(q, k, q_positions, k_positions, q_segments, k_segments, chunks)
    grouped = tiles.grouped(q)
    scale = tiles.head_dim**-0.5 * LOG2E
    first, last = tiles.spans(2)

    def row(n, results):
        b, rest = n // (tiles.kv_heads * tiles.nq), n % (tiles.kv_heads * tiles.nq)
        h, i = rest // tiles.nq, rest % tiles.nq
        q_tile = tiles.query(grouped, b, h, i) * scale

        def column(j, carry):
            def tile(carry, mask):
                acc, top, total = carry
                scores = tiles.dot(q_tile, tiles.key(k, b, h, j), ((1,), (1,)))
                if mask is not None:
                    scores = jnp.where(mask, scores, NOTHING)
                new_top = jnp.maximum(top, scores.max(1))
                weights = jnp.exp2(scores - new_top[:, None])
                if mask is not None:  # a row without any visible key has new_top == NOTHING
                    weights = jnp.where(mask, weights, 0.0)
                shrink = jnp.exp2(top - new_top)
                acc = acc * shrink[:, None] + tiles.dot(weights, tiles.key(v, b, h, j), ((1,), (0,)))
                return acc, new_top, total * shrink + weights.sum(1)

            return _by_class(tiles.classes[b, i, j], lambda: tiles.mask(b, i, j), carry, tile)

        start = (jnp.zeros_like(q_tile), jnp.full_like(q_tile[:, 0], NOTHING), jnp.zeros_like(q_tile[:, 0]))
        acc, top, total = lax.fori_loop(first[b, i], last[b, i], column, start)
        seen = total > 0
        out_tile = acc / jnp.where(seen, total, 1.0)[:, None]
        lse_tile = jnp.where(seen, (top + jnp.log2(jnp.where(seen, total, 1.0))) / LOG2E, NOTHING)
        out, lse = results
        shape = (1, tiles.cq, 1, tiles.group)
        out = lax.dynamic_update_slice(out, out_tile.reshape(*shape, -1), (b, i * tiles.cq, h, 0, 0))
        lse = lax.dynamic_update_slice(lse, lse_tile.reshape(shape), (b, i * tiles.cq, h, 0))
        return out, lse

    results = (jnp.zeros_like(grouped, tiles.dtype), jnp.zeros_like(grouped[..., 0], tiles.dtype))
    out, lse = lax.fori_loop(0, tiles.batch * tiles.kv_heads * tiles.nq, row, results)
    return out.reshape(q.shape), lse.reshape(q.shape[:3])


def grad_buffers(q, k):
    """Zeroed float32 accumulators for attend_grad: dq [B, N, H, T] (see there), dk and dv [B, S, K, H]."""
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    dq = jnp.zeros_like(jnp.moveaxis(q, 1, 3), dtype)
    return dq, jnp.zeros_like(k, dtype), jnp.zeros_like(k, dtype)


def dq_of(buffer):
    """The dq accumulator [B, N, H, T] as [B, T, N, H]."""
    return jnp.moveaxis(buffer, 3, 1)


def attend_grad(
    buffers, q, k, v, dout, lse, delta, q_positions, k_positions, q_segments, k_segments, chunks
):
    """Add the gradients of one block to buffers (dq, dk, dv), given the *global* lse.

    With p = exp(s - lse): dv = p^T dout, ds = p * (dout v^T - delta), dk = ds^T q, dq = ds k, where
    delta = rowsum(dout * out) (Dao 2023, section 3.1). Tiles are [key, row]: on CPUs a large transposed
    left operand halves the speed of a matmul, so the small key tile is the one transposed, and dq is
    accumulated with tokens last.
    """
    tiles = _Tiles(q, k, q_positions, k_positions, q_segments, k_segments, chunks)
    q, dout, lse, delta = (tiles.grouped(x) for x in (q, dout, lse, delta))
    scale = tiles.head_dim**-0.5
    first, last = tiles.spans(1)
    dq, dk, dv = buffers
    # [B, N, H, T] -> [B, K, G, H, T]: a tile of it is [G, H, query_chunk]
    dq = dq.reshape(tiles.batch, tiles.kv_heads, tiles.group, tiles.head_dim, tiles.q_len)

    def column(n, buffers):
        b, rest = n // (tiles.kv_heads * tiles.nk), n % (tiles.kv_heads * tiles.nk)
        h, j = rest // tiles.nk, rest % tiles.nk
        dq, dk, dv = buffers
        k_tile, v_tile = tiles.key(k, b, h, j), tiles.key(v, b, h, j)
        k_scaled = k_tile * scale

        def row(i, carry):
            dq, dk_tile, dv_tile = carry

            def tile(carry, mask):
                dq_tile, dk_tile, dv_tile = carry
                q_tile, g_tile = tiles.query(q, b, h, i), tiles.query(dout, b, h, i)
                lse_tile, delta_tile = tiles.query(lse, b, h, i), tiles.query(delta, b, h, i)
                scores = tiles.dot(k_scaled * LOG2E, q_tile, ((1,), (1,)))
                weights = jnp.exp2(scores - lse_tile * LOG2E)
                if mask is not None:
                    weights = jnp.where(mask.T, weights, 0.0)
                dv_tile = dv_tile + tiles.dot(weights, g_tile, ((1,), (0,)))
                ds = weights * (tiles.dot(v_tile, g_tile, ((1,), (1,))) - delta_tile)
                dk_tile = dk_tile + tiles.dot(ds, q_tile, ((1,), (0,)))
                added = tiles.dot(k_scaled.T, ds, ((1,), (0,)))  # [H, rows], rows = (query_chunk, G)
                added = jnp.moveaxis(added.reshape(tiles.head_dim, tiles.cq, tiles.group), 2, 0)
                return dq_tile + added, dk_tile, dv_tile

            where = (b, h, 0, 0, i * tiles.cq)
            dq_tile = lax.dynamic_slice(dq, where, (1, 1, tiles.group, tiles.head_dim, tiles.cq))[0, 0]
            dq_tile, dk_tile, dv_tile = _by_class(
                tiles.classes[b, i, j], lambda: tiles.mask(b, i, j), (dq_tile, dk_tile, dv_tile), tile
            )
            return lax.dynamic_update_slice(dq, dq_tile[None, None], where), dk_tile, dv_tile

        dq, dk_tile, dv_tile = lax.fori_loop(
            first[b, j], last[b, j], row, (dq, jnp.zeros_like(k_tile), jnp.zeros_like(v_tile))
        )
        return dq, _add_tile(dk, dk_tile * scale, b, h, j), _add_tile(dv, dv_tile, b, h, j)

    dq, dk, dv = lax.fori_loop(0, tiles.batch * tiles.kv_heads * tiles.nk, column, (dq, dk, dv))
    return dq.reshape(buffers[0].shape), dk, dv


def _add_tile(x, tile, b, h, j):
    """x [B, S, K, H] with tile [key_chunk, H] added to chunk j."""
    start = (b, j * tile.shape[0], h, 0)
    old = lax.dynamic_slice(x, start, (1, tile.shape[0], 1, tile.shape[1]))
    return lax.dynamic_update_slice(x, old + tile[None, :, None], start)
