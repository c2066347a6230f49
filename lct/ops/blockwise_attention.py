"""Blockwise attention on one device (Rabe & Staats 2021; Liu & Abbeel 2023; Dao 2023 for the backward).

Every inner block has the same contract: queries and one key/value block -> (out, lse), un-rounded float32,
where lse is the natural log-sum-exp. attend continues the online softmax of earlier blocks. attend_backward
adds to the gradients of earlier blocks, with dq in an internal layout between init_dq and finalize_dq. No
array is larger than the scores of one chunk pair. EMPTY chunk pairs are skipped and FULL ones build no mask.

A tile holds one key/value head: the G query heads that share it lie in the rows, so that one chunk of
keys serves G * query_chunk rows and the scores stay in the cache of a core.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lct.ops.int8 import Int8Vectors, dequantize
from lct.ops.masks import EMPTY, Tokens, attention_mask, chunk_classes

MASK_VALUE = -1e30  # lse of a row that has attended to no key: finite, so that merging needs no guard
LOG2E = math.log2(math.e)
ROWS = 256  # of a tile: with 256 keys its scores fill half of a core's 512 KiB


class QueryBlock(NamedTuple):
    """Queries, grouped by the key/value head that they share."""

    q: jax.Array  # [B, T, K, G, H]
    tokens: Tokens  # [B, T]


class KVBlock(NamedTuple):
    """Keys and values with everything that their mask needs: the unit that a ring rotates."""

    k: jax.Array | Int8Vectors  # [B, K, S, H]: heads first, so that a chunk of one head is contiguous
    v: jax.Array | Int8Vectors  # [B, K, S, H]
    stacked_tokens: jax.Array  # int32 [B, 2, S], positions and segment ids: one transfer instead of two

    @classmethod
    def create(cls, k: jax.Array | Int8Vectors, v: jax.Array | Int8Vectors, tokens: Tokens) -> 'KVBlock':
        """From k, v [B, K, S, H] and tokens [B, S]."""
        stacked = jnp.stack(tokens, 1)
        # Inside shard_map k may vary over more mesh axes than tokens; the operands of a barrier must agree.
        like_k = lax.full_like(jax.tree.leaves(k)[0], 0, stacked.dtype, shape=stacked.shape)
        return cls(k, v, stacked + like_k)

    @property
    def tokens(self) -> Tokens:
        return Tokens(self.stacked_tokens[:, 0], self.stacked_tokens[:, 1])


class Residuals(NamedTuple):
    """What the backward needs of each query row besides q; lse and delta are over all keys."""

    dout: jax.Array  # [B, T, K, G, H]
    lse: jax.Array  # [B, T, K, G]
    delta: jax.Array  # [B, T, K, G], rowsum(dout * out)


@dataclasses.dataclass(frozen=True)
class Chunks:
    """Tile sizes in tokens. query None: as many tokens as fill ROWS with the G heads of a group."""

    query: int | None = None
    key: int = 256

    def __post_init__(self):
        if self.key < 1 or (self.query is not None and self.query < 1):
            raise ValueError(f'attention chunks must be positive, got query {self.query}, key {self.key}')

    def queries(self, group: int) -> int:
        """Tokens of a query chunk where group heads share a key/value head."""
        return self.query or max(ROWS // group, 1)


def fit(chunk: int, length: int) -> int:
    """The largest size <= chunk that divides length, and also length / 2 where length is even.

    A zigzag shard is two stretches of the sequence; a chunk that straddles both could be neither skipped nor
    left unmasked.
    """
    stretch = length // 2 if length % 2 == 0 else length
    size = min(chunk, stretch)
    while stretch % size:
        size -= 1
    return size


def merge(
    left: tuple[jax.Array, jax.Array], right: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Combine two partial results (out [..., H], lse [...]) over disjoint keys."""
    (out_l, lse_l), (out_r, lse_r) = left, right
    top = jnp.maximum(lse_l, lse_r)
    weight_l, weight_r = jnp.exp(lse_l - top), jnp.exp(lse_r - top)
    total = weight_l + weight_r
    out = (out_l * weight_l[..., None] + out_r * weight_r[..., None]) / total[..., None]
    return out, top + jnp.log(total)


def init_accumulator(q: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Initial float32 (out [B, T, K, G, H], lse [B, T, K, G]) of attend, for q [B, T, K, G, H]."""
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    return jnp.zeros_like(q, dtype), jnp.full_like(q[..., 0], MASK_VALUE, dtype)


def _span(busy):
    """Along the last dim of busy: index of the first element that is set, and one past the last."""
    first = jnp.argmax(busy, -1)
    return first, jnp.where(busy.any(-1), busy.shape[-1] - jnp.argmax(jnp.flip(busy, -1), -1), first)


def _listed(busy):
    """Flat indices of busy [B, n] with the set elements first, and the number of set elements."""
    return jnp.argsort(~busy.reshape(-1), stable=True), busy.sum()


class _Tiles:
    """Slicing of one attention call into (batch row, key/value head, chunk) tiles."""

    def __init__(self, queries, block, chunks, window):
        q, self.q_tokens, self.k_tokens = queries.q, queries.tokens, block.tokens
        self.batch, self.q_len, self.kv_heads, self.group, self.head_dim = q.shape
        self.k_len = self.k_tokens.positions.shape[1]
        self.cq, self.ck = fit(chunks.queries(self.group), self.q_len), fit(chunks.key, self.k_len)
        self.nq, self.nk = self.q_len // self.cq, self.k_len // self.ck
        self.rows = self.cq * self.group
        self.dtype = jnp.promote_types(q.dtype, jnp.float32)
        # float32 means float32 on every device; products of bf16 inputs are exact in float32 as they are
        self.precision = lax.Precision.HIGHEST if q.dtype == self.dtype else lax.Precision.DEFAULT
        self.window = window
        self.classes = chunk_classes(self.q_tokens, self.k_tokens, self.cq, self.ck, window)
        self.key_span = _span(self.classes > EMPTY)
        self.query_span = _span(self.classes.swapaxes(1, 2) > EMPTY)

    def for_each(self, span, body, results):
        """Fold body(b, h, n, results) -> results over key/value heads h and the chunks n of batch rows b
        whose span (key_span or query_span) is not empty: packed documents leave most chunks without work."""
        first, last = span
        chosen, count = _listed(last > first)

        def step(n, results):
            at = chosen[n % count]
            return body(at // first.shape[1], n // count, at % first.shape[1], results)

        return lax.fori_loop(0, self.kv_heads * count, step, results)

    def over_keys(self, b, i, step, carry):
        """step(carry, j, compute_tile) over the key chunks j that query chunk i attends to."""
        first, last = self.key_span
        body = lambda j, carry: step(carry, j, self._tile(b, i, j))
        return lax.fori_loop(first[b, i], last[b, i], body, carry)

    def over_queries(self, b, j, step, carry):
        """step(carry, i, compute_tile) over the query chunks i that attend to key chunk j."""
        first, last = self.query_span
        body = lambda i, carry: step(carry, i, self._tile(b, i, j))
        return lax.fori_loop(first[b, j], last[b, j], body, carry)

    def _tile(self, b, i, j):
        """compute_tile(f, blank) is f(mask), f(None) for a FULL pair, or blank for an EMPTY one. It returns
        the share of this tile alone, because operands of a conditional are copied."""
        def compute_tile(f, blank):
            branches = (lambda: blank, lambda: f(self.mask(b, i, j)), lambda: f(None))
            return lax.switch(self.classes[b, i, j], branches)

        return compute_tile

    def mask(self, b, i, j):
        """Boolean [rows, key_chunk]."""
        def chunk(tokens, n, size):
            return Tokens(*(lax.dynamic_slice(x, (b, n * size), (1, size))[0] for x in tokens))

        mask = attention_mask(chunk(self.q_tokens, i, self.cq), chunk(self.k_tokens, j, self.ck), self.window)
        return jnp.repeat(mask, self.group, axis=0)

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
        """Chunk j of x [B, K, S, H] as [key_chunk, H], in float32 if x is quantized."""
        start, size = (b, h, j * self.ck, 0), (1, 1, self.ck, self.head_dim)
        return dequantize(jax.tree.map(
            lambda leaf: lax.dynamic_slice(leaf, start[:leaf.ndim], size[:leaf.ndim])[0, 0], x))

    def add_key(self, x, tile, b, h, j):
        """x [B, K, S, H] with tile [key_chunk, H] added to its chunk j."""
        tile = tile + self.key(x, b, h, j)
        return lax.dynamic_update_slice(x, tile[None, None], (b, h, j * self.ck, 0))

    def widen(self, tile):
        """A tile of inputs for a matmul with weights or ds, which are float32."""
        return tile.astype(self.dtype)

    def dot(self, x, y, contract):
        """Matmul of two tiles over one dim of each, accumulated in float32. On CPUs the inputs are converted
        to float32 first, because most CPUs have no bf16 arithmetic."""
        def dot(x, y):
            dims = (contract, ((), ()))
            return lax.dot_general(x, y, dims, self.precision, preferred_element_type=self.dtype)

        wide_dot = lambda x, y: dot(self.widen(x), self.widen(y))
        if self.dtype in (x.dtype, y.dtype):
            return wide_dot(x, y)
        return lax.platform_dependent(x, y, cpu=wide_dot, default=dot)


def attend(
    accumulator: tuple[jax.Array, jax.Array], queries: QueryBlock, block: KVBlock, chunks: Chunks,
    window: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Online softmax attention of the queries to one more key/value block.

    Args:
      accumulator: (out, lse) over the earlier blocks, or init_accumulator(q).
      window: tokens that a query attends to, itself included; None for all before it.
    Returns:
      out [B, T, K, G, H] and lse [B, T, K, G] in float32; rows that have attended to no key have out 0 and
      lse MASK_VALUE.
    """
    tiles = _Tiles(queries, block, chunks, window)
    q, k, v = queries.q, block.k, block.v
    scale = tiles.head_dim**-0.5 * LOG2E

    def query_chunk(b, h, i, results):
        out, lse = results
        q_tile, lse_tile = tiles.query(q, b, h, i), tiles.query(lse, b, h, i)

        def step(carry, j, compute_tile):
            acc, row_max, row_sum = carry

            def tile(mask):
                scores = tiles.dot(q_tile, tiles.key(k, b, h, j), ((1,), (1,))) * scale
                if mask is not None:  # far below MASK_VALUE, so that a masked key has weight 0 in every row
                    scores = jnp.where(mask, scores, 2 * MASK_VALUE)
                row_max = scores.max(1)
                weights = jnp.exp2(scores - row_max[:, None])
                v_tile = tiles.widen(tiles.key(v, b, h, j))
                return tiles.dot(weights, v_tile, ((1,), (0,))), row_max, weights.sum(1)

            blank = jnp.zeros_like(acc), jnp.full_like(row_max, 2 * MASK_VALUE), jnp.zeros_like(row_sum)
            tile_acc, tile_max, tile_sum = compute_tile(tile, blank)
            new_max = jnp.maximum(row_max, tile_max)
            old, new = jnp.exp2(row_max - new_max), jnp.exp2(tile_max - new_max)
            return acc * old[:, None] + tile_acc * new[:, None], new_max, row_sum * old + tile_sum * new

        attended = lse_tile > MASK_VALUE
        row_max = jnp.where(attended, lse_tile * LOG2E, MASK_VALUE)
        start = tiles.query(out, b, h, i), row_max, attended.astype(tiles.dtype)
        acc, row_max, row_sum = tiles.over_keys(b, i, step, start)
        attended = row_sum > 0
        row_sum = jnp.where(attended, row_sum, 1.0)
        lse_tile = jnp.where(attended, (row_max + jnp.log2(row_sum)) / LOG2E, MASK_VALUE)
        return tiles.put_query(out, acc / row_sum[:, None], b, h, i), tiles.put_query(lse, lse_tile, b, h, i)

    return tiles.for_each(tiles.key_span, query_chunk, accumulator)


def attend_backward(
    grads: tuple[jax.Array, jax.Array, jax.Array], queries: QueryBlock, block: KVBlock, residuals: Residuals,
    chunks: Chunks, window: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of one more key/value block, given the *global* lse.

    With p = exp(s - lse): dv = p^T dout, ds = p * (dout v^T - delta), dk = ds^T q, dq = ds k, where
    delta = rowsum(dout * out) (Dao 2023, section 3.1). Tiles are [key, row]: on CPUs a large transposed left
    operand halves the speed of a matmul, so only k is transposed, once for all queries that attend to it, and
    dq accumulates transposed.

    Args:
      grads: (dq, dk, dv) so far, float32: dq from init_dq, to be converted by finalize_dq; dk, dv like k, v.
    Returns:
      grads with the block's share added.
    """
    tiles = _Tiles(queries, block, chunks, window)
    q, k, v, dout = queries.q, block.k, block.v, residuals.dout
    scale = tiles.head_dim**-0.5
    # [B, K, T * G]: loops over the rows of a tile are vectorised only if these are contiguous
    lse, delta = (x.swapaxes(1, 2).reshape(tiles.batch, tiles.kv_heads, -1)
                  for x in (residuals.lse * LOG2E, residuals.delta))

    def key_chunk(b, h, j, grads):
        dq, dk, dv = grads
        k_tile, v_tile = tiles.key(k, b, h, j), tiles.key(v, b, h, j)
        k_transposed, blank = tiles.widen(k_tile).T, jnp.zeros_like(k_tile, tiles.dtype)

        def step(carry, i, compute_tile):
            dq, dk_tile, dv_tile = carry

            def tile(mask):
                q_tile, dout_tile = tiles.query(q, b, h, i), tiles.query(dout, b, h, i)
                lse_tile, delta_tile = tiles.row(lse, b, h, i), tiles.row(delta, b, h, i)
                scores = tiles.dot(k_tile, q_tile, ((1,), (1,)))
                weights = jnp.exp2(scores * (scale * LOG2E) - lse_tile)
                if mask is not None:
                    weights = jnp.where(mask.T, weights, 0.0)
                ds = weights * (tiles.dot(v_tile, dout_tile, ((1,), (1,))) - delta_tile) * scale
                return (tiles.dot(k_transposed, ds, ((1,), (0,))),
                        tiles.dot(ds, tiles.widen(q_tile), ((1,), (0,))),
                        tiles.dot(weights, tiles.widen(dout_tile), ((1,), (0,))))

            blank_dq = jnp.zeros_like(k_transposed, shape=(tiles.head_dim, tiles.rows))
            tile_dq, tile_dk, tile_dv = compute_tile(tile, (blank_dq, blank, blank))
            return tiles.add_row(dq, tile_dq, b, h, i), dk_tile + tile_dk, dv_tile + tile_dv

        dq, dk_tile, dv_tile = tiles.over_queries(b, j, step, (dq, blank, blank))
        return dq, tiles.add_key(dk, dk_tile, b, h, j), tiles.add_key(dv, dv_tile, b, h, j)

    return tiles.for_each(tiles.query_span, key_chunk, grads)


def init_grads(*inputs: jax.Array) -> tuple[jax.Array, ...]:
    """Initial dk and dv of attend_backward: float32 zeros in the shapes of k and v [B, K, S, H]."""
    return tuple(jnp.zeros_like(x, jnp.promote_types(x.dtype, jnp.float32)) for x in inputs)


def init_dq(q: jax.Array) -> jax.Array:
    """Initial float32 dq of attend_backward, for q [B, T, K, G, H]: [B, K, H, T * G], as computed."""
    batch, length, kv_heads, group, head_dim = q.shape
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    return jnp.zeros_like(q, dtype, shape=(batch, kv_heads, head_dim, length * group))


def finalize_dq(dq: jax.Array, q: jax.Array) -> jax.Array:
    """dq [B, K, H, T * G] after the last block, in the shape of q [B, T, K, G, H]."""
    batch, length, kv_heads, group, head_dim = q.shape
    return dq.reshape(batch, kv_heads, head_dim, length, group).transpose(0, 3, 1, 4, 2)
