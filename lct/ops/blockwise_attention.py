"""Blockwise attention on one device (Rabe & Staats 2021; Liu & Abbeel 2023; Dao 2023 for the backward).

The contract of every inner block: (q, k, v, positions, segments) -> (out, lse), float32 and un-rounded,
lse the natural log-sum-exp. attend goes on from the result over earlier blocks of keys, attend_grad from the
gradients of earlier blocks. Nothing larger than one chunk pair of scores exists, pairs that cannot see each
other are skipped, and pairs that see each other whole build no mask.

A tile holds one key/value head: the G query heads that share it lie in the rows, so that one chunk of
keys serves G * query_chunk rows and the scores stay in the cache of a core.
"""

import dataclasses
import math

import jax.numpy as jnp
from jax import lax

from lct.ops.masks import EMPTY, chunk_classes, visible

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


def nothing(q):
    """(out, lse) over no keys at all, float32: where attend begins. q [B, T, K, G, H] -> [B, T, K, G, H] and
    [B, T, K, G]."""
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    return jnp.zeros_like(q, dtype), jnp.full_like(q[..., 0], NOTHING, dtype)


class _Tiles:
    """Slicing of one attention call into (batch row, key/value head, chunk) tiles."""

    def __init__(self, q, k, q_positions, k_positions, q_segments, k_segments, chunks, window):
        self.batch, self.q_len, self.kv_heads, self.group, self.head_dim = q.shape
        self.k_len = k.shape[2]
        self.cq, self.ck = fit(chunks.query, self.q_len), fit(chunks.key, self.k_len)
        self.nq, self.nk = self.q_len // self.cq, self.k_len // self.ck
        self.rows = self.cq * self.group
        self.dtype = jnp.promote_types(q.dtype, jnp.float32)
        # float32 means float32 on every device; rounded inputs gain nothing from it
        self.precision = lax.Precision.HIGHEST if q.dtype == self.dtype else lax.Precision.DEFAULT
        self.where, self.window = (q_positions, k_positions, q_segments, k_segments), window
        self.classes = chunk_classes(*self.where, self.cq, self.ck, window)
        busy = self.classes > EMPTY
        self.first = jnp.argmax(busy, 2)  # of the key chunks that a query chunk sees, and one past the last
        self.last = jnp.where(busy.any(2), self.nk - jnp.argmax(jnp.flip(busy, 2), 2), self.first)

    def each_row(self, row, results):
        """row(b, h, i, results) -> results, over batch rows, key/value heads and query chunks."""
        def step(n, results):
            b, rest = n // (self.kv_heads * self.nq), n % (self.kv_heads * self.nq)
            return row(b, rest // self.nq, rest % self.nq, results)

        return lax.fori_loop(0, self.batch * self.kv_heads * self.nq, step, results)

    def each_key(self, b, i, step, carry):
        """step(carry, j, tile_of) over the key chunks that query chunk i sees. tile_of(f, blank) is f(mask), f(None)
        where nothing is hidden, or blank where nothing is seen: a tile's share alone, because what goes through a
        conditional is copied."""
        def column(j, carry):
            def tile_of(f, blank):
                branches = (lambda: blank, lambda: f(self.mask(b, i, j)), lambda: f(None))
                return lax.switch(self.classes[b, i, j], branches)

            return step(carry, j, tile_of)

        return lax.fori_loop(self.first[b, i], self.last[b, i], column, carry)

    def mask(self, b, i, j):
        """Boolean [rows, key_chunk]."""
        q_pos, k_pos, q_seg, k_seg = self.where
        cut = lambda x, n, size: lax.dynamic_slice(x, (b, n * size), (1, size))[0]
        seen = visible(cut(q_pos, i, self.cq), cut(k_pos, j, self.ck), cut(q_seg, i, self.cq),
                       cut(k_seg, j, self.ck), self.window)
        return jnp.repeat(seen, self.group, axis=0)

    def query(self, x, b, h, i):
        """Chunk i of x [B, T, K, G, ...] as [rows, ...]."""
        start = (b, i * self.cq, h) + (0,) * (x.ndim - 3)
        tile = lax.dynamic_slice(x, start, (1, self.cq, 1, self.group, *x.shape[4:]))
        return tile.reshape(self.rows, *x.shape[4:]).astype(self.dtype)

    def put_query(self, x, tile, b, h, i):
        """x with its chunk i replaced by tile [rows, ...]."""
        tile = tile.reshape(1, self.cq, 1, self.group, *tile.shape[1:])
        return lax.dynamic_update_slice(x, tile, (b, i * self.cq, h) + (0,) * (x.ndim - 3))

    def key(self, x, b, h, j):
        """Chunk j of x [B, K, S, H] as [key_chunk, H]."""
        return lax.dynamic_slice(x, (b, h, j * self.ck, 0), (1, 1, self.ck, self.head_dim))[0, 0].astype(self.dtype)

    def add_key(self, x, tile, b, h, j):
        """x [B, K, S, H] with tile [key_chunk, H] added to its chunk j."""
        tile = tile + self.key(x, b, h, j)
        return lax.dynamic_update_slice(x, tile[None, None], (b, h, j * self.ck, 0))

    def dot(self, x, y, contract):
        """Matmul of two tiles over one dim of each, accumulated in float32."""
        return lax.dot_general(x, y, (contract, ((), ())), self.precision, preferred_element_type=self.dtype)


def attend(total, q, k, v, q_positions, k_positions, q_segments, k_segments, chunks, window=None):
    """Attention of q to one more block of keys and values.

    Args:
      total: (out, lse) over the blocks before, or nothing(q).
      q: [B, T, K, G, H], query heads by the key/value head that they share; k, v: [B, K, S, H], so that a chunk of
        one head is one piece of memory. Reshaping here, in the loop of a ring, would copy q at every hop.
      positions and segments: int32 [B, T] of q, [B, S] of k.
      chunks: Chunks; window: tokens that a query sees, itself included, or None for all before it.
    Returns:
      out [B, T, K, G, H] and lse [B, T, K, G] in float32; out is 0 and lse NOTHING where no key was visible.
    """
    tiles = _Tiles(q, k, q_positions, k_positions, q_segments, k_segments, chunks, window)
    scale = tiles.head_dim**-0.5 * LOG2E

    def row(b, h, i, results):
        out, lse = results
        q_tile, lse_tile = tiles.query(q, b, h, i) * scale, tiles.query(lse, b, h, i)

        def step(carry, j, tile_of):
            acc, top, total = carry

            def tile(mask):
                scores = tiles.dot(q_tile, tiles.key(k, b, h, j), ((1,), (1,)))
                if mask is not None:  # far below NOTHING: an unseen key weighs 0 in every row
                    scores = jnp.where(mask, scores, 2 * NOTHING)
                top = scores.max(1)
                weights = jnp.exp2(scores - top[:, None])
                return tiles.dot(weights, tiles.key(v, b, h, j), ((1,), (0,))), top, weights.sum(1)

            tile_acc, tile_top, tile_total = tile_of(tile, (jnp.zeros_like(acc), jnp.full_like(top, 2 * NOTHING), jnp.zeros_like(total)))
            new_top = jnp.maximum(top, tile_top)
            old, new = jnp.exp2(top - new_top), jnp.exp2(tile_top - new_top)
            return acc * old[:, None] + tile_acc * new[:, None], new_top, total * old + tile_total * new

        seen = lse_tile > NOTHING
        start = tiles.query(out, b, h, i), jnp.where(seen, lse_tile * LOG2E, NOTHING), seen.astype(tiles.dtype)
        acc, top, total = tiles.each_key(b, i, step, start)
        seen = total > 0
        total = jnp.where(seen, total, 1.0)
        lse_tile = jnp.where(seen, (top + jnp.log2(total)) / LOG2E, NOTHING)
        return tiles.put_query(out, acc / total[:, None], b, h, i), tiles.put_query(lse, lse_tile, b, h, i)

    return tiles.each_row(row, total)


def attend_grad(
    grads, q, k, v, dout, lse, delta, q_positions, k_positions, q_segments, k_segments, chunks, window=None
):
    """Gradients of one more block, given the *global* lse.

    With p = exp(s - lse): dv = p^T dout, ds = p * (dout v^T - delta), dk = ds^T q, dq = ds k, where
    delta = rowsum(dout * out) (Dao 2023, section 3.1). Tiles are [key, row]: on CPUs a large transposed
    left operand halves the speed of a matmul, so only small tiles are transposed.

    Args:
      grads: (dq, dk, dv) so far, float32 of the shapes of q, k, v.
    Returns:
      grads with the block's share added.
    """
    tiles = _Tiles(q, k, q_positions, k_positions, q_segments, k_segments, chunks, window)
    scale = tiles.head_dim**-0.5

    def row(b, h, i, grads):
        dq, dk, dv = grads
        q_tile, dout_tile = tiles.query(q, b, h, i) * scale, tiles.query(dout, b, h, i)
        lse_tile, delta_tile = tiles.query(lse, b, h, i) * LOG2E, tiles.query(delta, b, h, i)

        def step(carry, j, tile_of):
            dq_tile, dk, dv = carry

            def tile(mask):
                k_tile, v_tile = tiles.key(k, b, h, j), tiles.key(v, b, h, j)
                scores = tiles.dot(k_tile * LOG2E, q_tile, ((1,), (1,)))
                weights = jnp.exp2(scores - lse_tile)
                if mask is not None:
                    weights = jnp.where(mask.T, weights, 0.0)
                ds = weights * (tiles.dot(v_tile, dout_tile, ((1,), (1,))) - delta_tile)
                return (tiles.dot(k_tile.T, ds, ((1,), (0,))), tiles.dot(ds, q_tile, ((1,), (0,))),
                        tiles.dot(weights, dout_tile, ((1,), (0,))))

            blank = jnp.zeros_like(tiles.key(k, b, h, j))
            more_dq, more_dk, more_dv = tile_of(tile, (jnp.zeros_like(dq_tile), blank, blank))
            return dq_tile + more_dq, tiles.add_key(dk, more_dk, b, h, j), tiles.add_key(dv, more_dv, b, h, j)

        start = jnp.zeros_like(q_tile.T), dk, dv
        dq_tile, dk, dv = tiles.each_key(b, i, step, start)
        return tiles.put_query(dq, tiles.query(dq, b, h, i) + dq_tile.T * scale, b, h, i), dk, dv

    return tiles.each_row(row, grads)


def zero_grads(*inputs):
    """Zeros in float32 like the inputs: the gradients that attend_grad begins with."""
    return tuple(jnp.zeros_like(x, jnp.promote_types(x.dtype, jnp.float32)) for x in inputs)
