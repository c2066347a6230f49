"""Blockwise attention on one device (Rabe & Staats 2021; Liu & Abbeel 2023; Dao 2023 for the backward).

The contract of every inner block: (q, k, v, positions, segments) -> (out, lse), float32 and un-rounded,
lse the natural log-sum-exp. attend goes on from the result over earlier blocks of keys, attend_grad from the
gradients of earlier blocks, dq in a layout of its own between zero_dq and finished_dq. Nothing larger than one
chunk pair of scores exists, pairs that cannot see each
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
ROWS = 256  # of a tile: with 256 keys its scores fill half of a core's 512 KiB


@dataclasses.dataclass(frozen=True)
class Chunks:
    """Tokens of queries and keys that one tile works on. query None: as many as make ROWS with their heads."""

    query: int | None = None
    key: int = 256

    def __post_init__(self):
        if self.key < 1 or (self.query is not None and self.query < 1):
            raise ValueError(f'attention chunks must be positive, got query {self.query}, key {self.key}')

    def queries(self, group):
        """Tokens of a chunk of queries of which group heads share a key/value head."""
        return self.query or max(ROWS // group, 1)


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


def _span(busy):
    """Of the last dim of busy, the first that is set and one past the last."""
    first = jnp.argmax(busy, -1)
    return first, jnp.where(busy.any(-1), busy.shape[-1] - jnp.argmax(jnp.flip(busy, -1), -1), first)


def _listed(busy):
    """Where busy [B, n] is set: (indices of its flattened elements, those that are set first; their number)."""
    return jnp.argsort(~busy.reshape(-1), stable=True), busy.sum()


class _Tiles:
    """Slicing of one attention call into (batch row, key/value head, chunk) tiles."""

    def __init__(self, q, k, q_positions, k_positions, q_segments, k_segments, chunks, window):
        self.batch, self.q_len, self.kv_heads, self.group, self.head_dim = q.shape
        self.k_len = k.shape[2]
        self.cq, self.ck = fit(chunks.queries(self.group), self.q_len), fit(chunks.key, self.k_len)
        self.nq, self.nk = self.q_len // self.cq, self.k_len // self.ck
        self.rows = self.cq * self.group
        self.dtype = jnp.promote_types(q.dtype, jnp.float32)
        # float32 means float32 on every device; products of bf16 inputs are exact in float32 as they are
        self.precision = lax.Precision.HIGHEST if q.dtype == self.dtype else lax.Precision.DEFAULT
        self.where, self.window = (q_positions, k_positions, q_segments, k_segments), window
        self.classes = chunk_classes(*self.where, self.cq, self.ck, window)
        self.keys_of, self.queries_of = _span(self.classes > EMPTY), _span(self.classes.swapaxes(1, 2) > EMPTY)

    def each(self, span, body, results):
        """body(b, h, n, results) -> results, over key/value heads and the chunks n of batch rows b whose span, keys_of
        or queries_of, holds anything: packed documents leave most chunks of a block with nothing to do."""
        first, last = span
        chosen, count = _listed(last > first)

        def step(n, results):
            at = chosen[n % count]
            return body(at // first.shape[1], n // count, at % first.shape[1], results)

        return lax.fori_loop(0, self.kv_heads * count, step, results)

    def keys_seen(self, b, i, step, carry):
        """step(carry, j, tile_of) over the key chunks that query chunk i sees."""
        first, last = self.keys_of
        return lax.fori_loop(first[b, i], last[b, i], lambda j, carry: step(carry, j, self._tile(b, i, j)), carry)

    def queries_seeing(self, b, j, step, carry):
        """step(carry, i, tile_of) over the query chunks that see key chunk j."""
        first, last = self.queries_of
        return lax.fori_loop(first[b, j], last[b, j], lambda i, carry: step(carry, i, self._tile(b, i, j)), carry)

    def _tile(self, b, i, j):
        """tile_of(f, blank) is f(mask), f(None) where nothing is hidden, or blank where nothing is seen: a tile's
        share alone, because what goes through a conditional is copied."""
        def tile_of(f, blank):
            branches = (lambda: blank, lambda: f(self.mask(b, i, j)), lambda: f(None))
            return lax.switch(self.classes[b, i, j], branches)

        return tile_of

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
        return tile.reshape(self.rows, *x.shape[4:])

    def put_query(self, x, tile, b, h, i):
        """x with its chunk i replaced by tile [rows, ...]."""
        tile = tile.reshape(1, self.cq, 1, self.group, *tile.shape[1:])
        return lax.dynamic_update_slice(x, tile, (b, i * self.cq, h) + (0,) * (x.ndim - 3))

    def row(self, x, b, h, i):
        """Chunk i of x [B, K, T * G] as [rows]."""
        return lax.dynamic_slice(x, (b, h, i * self.rows), (1, 1, self.rows))[0, 0]

    def add_row(self, x, tile, b, h, i):
        """x [B, K, H, T * G] with tile [H, rows] added to its chunk i."""
        start, shape = (b, h, 0, i * self.rows), (1, 1, self.head_dim, self.rows)
        return lax.dynamic_update_slice(x, lax.dynamic_slice(x, start, shape) + tile[None, None], start)

    def key(self, x, b, h, j):
        """Chunk j of x [B, K, S, H] as [key_chunk, H]."""
        return lax.dynamic_slice(x, (b, h, j * self.ck, 0), (1, 1, self.ck, self.head_dim))[0, 0]

    def add_key(self, x, tile, b, h, j):
        """x [B, K, S, H] with tile [key_chunk, H] added to its chunk j."""
        tile = tile + self.key(x, b, h, j)
        return lax.dynamic_update_slice(x, tile[None, None], (b, h, j * self.ck, 0))

    def wide(self, tile):
        """A tile of inputs for a matmul with weights or ds, which are float32."""
        return tile.astype(self.dtype)

    def dot(self, x, y, contract):
        """Matmul of two tiles over one dim of each, accumulated in float32. CPUs without bf16 arithmetic take longer
        over products of bf16 than over the same ones in float32."""
        dot = lambda x, y: lax.dot_general(x, y, (contract, ((), ())), self.precision, preferred_element_type=self.dtype)
        if x.dtype == self.dtype:
            return dot(x, y)
        return lax.platform_dependent(x, y, cpu=lambda x, y: dot(self.wide(x), self.wide(y)), default=dot)


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
        q_tile, lse_tile = tiles.query(q, b, h, i), tiles.query(lse, b, h, i)

        def step(carry, j, tile_of):
            acc, top, total = carry

            def tile(mask):
                scores = tiles.dot(q_tile, tiles.key(k, b, h, j), ((1,), (1,))) * scale
                if mask is not None:  # far below NOTHING: an unseen key weighs 0 in every row
                    scores = jnp.where(mask, scores, 2 * NOTHING)
                top = scores.max(1)
                weights = jnp.exp2(scores - top[:, None])
                return tiles.dot(weights, tiles.wide(tiles.key(v, b, h, j)), ((1,), (0,))), top, weights.sum(1)

            blank = jnp.zeros_like(acc), jnp.full_like(top, 2 * NOTHING), jnp.zeros_like(total)
            tile_acc, tile_top, tile_total = tile_of(tile, blank)
            new_top = jnp.maximum(top, tile_top)
            old, new = jnp.exp2(top - new_top), jnp.exp2(tile_top - new_top)
            return acc * old[:, None] + tile_acc * new[:, None], new_top, total * old + tile_total * new

        seen = lse_tile > NOTHING
        start = tiles.query(out, b, h, i), jnp.where(seen, lse_tile * LOG2E, NOTHING), seen.astype(tiles.dtype)
        acc, top, total = tiles.keys_seen(b, i, step, start)
        seen = total > 0
        total = jnp.where(seen, total, 1.0)
        lse_tile = jnp.where(seen, (top + jnp.log2(total)) / LOG2E, NOTHING)
        return tiles.put_query(out, acc / total[:, None], b, h, i), tiles.put_query(lse, lse_tile, b, h, i)

    return tiles.each(tiles.keys_of, row, total)


def attend_grad(
    grads, q, k, v, dout, lse, delta, q_positions, k_positions, q_segments, k_segments, chunks, window=None
):
    """Gradients of one more block, given the *global* lse.

    With p = exp(s - lse): dv = p^T dout, ds = p * (dout v^T - delta), dk = ds^T q, dq = ds k, where
    delta = rowsum(dout * out) (Dao 2023, section 3.1). Tiles are [key, row]: on CPUs a large transposed
    left operand halves the speed of a matmul, so only k is transposed, once for all queries that see it,
    and dq grows transposed.

    Args:
      grads: (dq, dk, dv) so far, float32: dq from zero_dq, to be turned by finished_dq; dk, dv like k, v.
    Returns:
      grads with the block's share added.
    """
    tiles = _Tiles(q, k, q_positions, k_positions, q_segments, k_segments, chunks, window)
    scale = tiles.head_dim**-0.5
    # [B, K, T * G]: the rows of a tile side by side, or no loop over it is vectorised
    lse, delta = (x.swapaxes(1, 2).reshape(tiles.batch, tiles.kv_heads, -1) for x in (lse * LOG2E, delta))

    def column(b, h, j, grads):
        dq, dk, dv = grads
        k_tile, v_tile = tiles.key(k, b, h, j), tiles.key(v, b, h, j)
        k_across, blank = tiles.wide(k_tile).T, jnp.zeros_like(k_tile, tiles.dtype)

        def step(carry, i, tile_of):
            dq, dk_tile, dv_tile = carry

            def tile(mask):
                q_tile, dout_tile = tiles.query(q, b, h, i), tiles.query(dout, b, h, i)
                lse_tile, delta_tile = tiles.row(lse, b, h, i), tiles.row(delta, b, h, i)
                scores = tiles.dot(k_tile, q_tile, ((1,), (1,)))
                weights = jnp.exp2(scores * (scale * LOG2E) - lse_tile)
                if mask is not None:
                    weights = jnp.where(mask.T, weights, 0.0)
                ds = weights * (tiles.dot(v_tile, dout_tile, ((1,), (1,))) - delta_tile) * scale
                return (tiles.dot(k_across, ds, ((1,), (0,))), tiles.dot(ds, tiles.wide(q_tile), ((1,), (0,))),
                        tiles.dot(weights, tiles.wide(dout_tile), ((1,), (0,))))

            blank_dq = jnp.zeros_like(k_across, shape=(tiles.head_dim, tiles.rows))
            more_dq, more_dk, more_dv = tile_of(tile, (blank_dq, blank, blank))
            return tiles.add_row(dq, more_dq, b, h, i), dk_tile + more_dk, dv_tile + more_dv

        dq, dk_tile, dv_tile = tiles.queries_seeing(b, j, step, (dq, blank, blank))
        return dq, tiles.add_key(dk, dk_tile, b, h, j), tiles.add_key(dv, dv_tile, b, h, j)

    return tiles.each(tiles.queries_of, column, grads)


def zero_grads(*inputs):
    """Zeros in float32 like the inputs: the dk and dv that attend_grad begins with."""
    return tuple(jnp.zeros_like(x, jnp.promote_types(x.dtype, jnp.float32)) for x in inputs)


def zero_dq(q):
    """The dq that attend_grad begins with: float32 [B, K, H, T * G], as its matmul leaves it. q [B, T, K, G, H]."""
    batch, length, kv_heads, group, head_dim = q.shape
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    return jnp.zeros_like(q, dtype, shape=(batch, kv_heads, head_dim, length * group))


def finished_dq(dq, q):
    """dq of the last block, [B, K, H, T * G], in the shape of q [B, T, K, G, H]."""
    batch, length, kv_heads, group, head_dim = q.shape
    return dq.reshape(batch, kv_heads, head_dim, length, group).transpose(0, 3, 1, 4, 2)
