"""The inner block as fused GPU kernels: Pallas through Triton, for Ada, Ampere and Hopper.

Contract, masks and chunk classes are shared with lct.ops.blockwise_attention, which stays the reference; the
algorithm is FlashAttention-2 (Dao 2023, arXiv 2307.08691). The chunk classes reach a kernel as a list of the
chunks that a tile must visit, FULL ones first, then MIXED ones; EMPTY chunks are left out. So each kernel is
two loops without a branch, and the compiler can prefetch the next tile while it computes on this one.

A tile of queries holds the same few tokens of all query heads that share a key/value head: each tile of keys
that is fetched serves them all, and chunks of few tokens still fill a matrix instruction.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from lct.ops.blockwise_attention import LOG2E, MASK_VALUE, Chunks, KVBlock, QueryBlock, Residuals
from lct.ops.masks import EMPTY, FULL, Tokens, attention_mask, chunk_classes

INTERPRET = False  # set by tests: the same kernels as plain XLA, slow but on any device
DTYPES = ('bfloat16', 'float16', 'float32')
HEAD_DIMS = (16, 32, 64, 128, 256)
CAPABILITIES = 8.0, float('inf')  # of a CUDA device, from and below: its matrix instructions take bfloat16


@dataclasses.dataclass(frozen=True)
class Tile:
    """Rows (tokens x heads) and keys of one matrix product, warps that share it, pipeline stages."""

    rows: int
    keys: int
    warps: int
    stages: int


# Chosen by arithmetic and by compiler reports, not by measurement. Per block of threads an Ada SM has 99 KiB
# of shared memory, a Hopper SM 227 KiB; a thread has at most 255 registers of 4 bytes.
#   forward, H = 128: acc 128 x 128 and scores 128 x 64 in float32 over 256 threads are 64 + 32 registers, q
#   32 more; k and v tiles of 16 KiB, two of each in flight, are 64 KiB. H = 64 needs half the threads.
#   H = 256 takes half the rows and half the keys: again 64 registers of acc and 64 KiB in flight.
#   backward, H = 128: dk and dv 64 x 128 each are 64 registers, scores and ds 64 x 64 another 32; q and dout
#   tiles of 16 KiB two deep are 64 KiB. H = 256 again takes half of both. The dq kernel holds less in the
#   same tiles.
# float32 has no matrix instruction of full precision: its products are scalar FMAs, so tiles are small.
FORWARD = {64: Tile(128, 64, 4, 3), 128: Tile(128, 64, 8, 2), 256: Tile(64, 32, 8, 2)}
BACKWARD = {64: Tile(64, 64, 4, 2), 128: Tile(64, 64, 8, 2), 256: Tile(32, 32, 8, 2)}
FLOAT32 = {64: Tile(32, 32, 8, 1), 128: Tile(32, 32, 8, 1), 256: Tile(16, 16, 8, 1)}


class _Call:
    """One call divided into tiles: padded arguments, their sizes, and the order of a kernel's visits."""

    def __init__(self, tiles, queries, block, chunks, window):
        q = queries.q
        self.batch, self.q_len, self.kv_heads, group, self.head_dim = q.shape
        self.k_len = block.k.shape[2]
        if q.dtype.name not in DTYPES or self.head_dim not in HEAD_DIMS:
            raise ValueError(
                f'the triton kernel takes {", ".join(DTYPES)} and head_dim {", ".join(map(str, HEAD_DIMS))}, '
                f"got {q.dtype.name} and {self.head_dim}; use kernel 'xla'")
        self.tile = tile = (FLOAT32 if q.dtype == jnp.float32 else tiles)[max(self.head_dim, 64)]
        self.window = window
        self.scale = self.head_dim**-0.5
        self.precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else lax.Precision.DEFAULT
        self.fold = min(group & -group, tile.rows)  # heads of a tile: sizes are powers of two
        self.bundles = group // self.fold
        self.query_chunk, self.key_chunk = _power_of_two(chunks.queries(group)), _power_of_two(chunks.key)
        self.query = min(max(tile.rows // self.fold, 1), self.query_chunk)  # tokens of a tile
        self.key = min(tile.keys, self.key_chunk)
        self.q_tokens = Tokens(*(self.pad(x, 'q') for x in queries.tokens))
        self.k_tokens = Tokens(*(self.pad(x, 'k') for x in block.tokens))
        self.classes = chunk_classes(self.q_tokens, self.k_tokens, self.query_chunk, self.key_chunk, window)

    def pad(self, x, kind):
        """x padded to whole chunks with tokens of segment 0.

        kind 'q' is [B, T, ...], kind 'k' [B, S] or [B, K, S, H].
        """
        dim, chunk = (1, self.query_chunk) if kind == 'q' else (x.ndim // 2, self.key_chunk)
        return jnp.pad(x, [(0, -x.shape[dim] % chunk * (i == dim)) for i in range(x.ndim)])

    def run(self, kernel, grid, lists, inputs, results):
        """results after a kernel that updates them in place."""
        args = (*lists, *self.q_tokens, *self.k_tokens, *inputs)
        # inside shard_map a result varies over the mesh axes of its initial value
        shape_like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=jax.typeof(x).mat)
        return pl.pallas_call(
            functools.partial(kernel, self),
            out_shape=list(map(shape_like, results)),
            grid=grid,
            input_output_aliases={len(args) + i: i for i in range(len(results))},
            compiler_params=triton.CompilerParams(num_warps=self.tile.warps, num_stages=self.tile.stages),
            interpret=INTERPRET,
            name=kernel.__name__.strip('_'),
        )(*args, *results)

    def grid_of_queries(self):
        return self.q_tokens.positions.shape[1] // self.query, self.kv_heads * self.bundles, self.batch

    def query_program(self):
        """(query tile, bundle, batch row) of a program.

        Late query tiles attend to the most keys and run first, so that none of them runs alone at the end.
        Early key tiles have the most queries and come first anyway.
        """
        return pl.num_programs(0) - 1 - pl.program_id(0), pl.program_id(1), pl.program_id(2)

    def grid_of_keys(self):
        return self.k_tokens.positions.shape[1] // self.key, self.kv_heads, self.batch

    def rows(self, b, n, i):
        """Indices of the rows of query tile i of bundle n in an array [B, T, K, G, ...]."""
        row = lax.iota(jnp.int32, self.query * self.fold)
        tokens = i * self.query + lax.div(row, self.fold)
        heads = lax.rem(n, self.bundles) * self.fold + lax.rem(row, self.fold)
        return b, tokens, lax.div(n, self.bundles), heads

    def keys(self, j):
        return pl.ds(j * self.key, self.key)

    def dot(self, x, y, dims):
        """Product of two tiles over one dim of each, accumulated in float32."""
        dims = ((dims[:1], dims[1:]), ((), ()))
        return lax.dot_general(x, y, dims, self.precision, preferred_element_type=jnp.float32)


def _power_of_two(chunk):
    """The largest power of two up to chunk; at least 16, the smallest dim of a matrix instruction."""
    return max(16, 1 << chunk.bit_length() - 1)


def _lists(classes):
    """classes [B, chunks, chunks to visit] -> order of visits, number of FULL ones, number of non-EMPTY."""
    return jnp.argsort(-classes, axis=2).astype(jnp.int32), (classes == FULL).sum(2), (classes > EMPTY).sum(2)


def _visit(lists, at, tiles, step, carry):
    """step(carry, tile, masked) over the tiles, `tiles` per chunk, that the chunk `at` (b, c) must visit."""
    order, full, busy = lists

    def body(masked):
        tile = lambda m: order[(*at, lax.div(m, tiles))] * tiles + lax.rem(m, tiles)
        return lambda m, carry: step(carry, tile(m), masked)

    carry = lax.fori_loop(0, full[at] * tiles, body(False), carry)
    return lax.fori_loop(full[at] * tiles, busy[at] * tiles, body(True), carry)


def _attend(call, order, full, busy, q_pos, q_seg, k_pos, k_seg, q, k, v, out, lse, new_out, new_lse):
    i, n, b = call.query_program()
    rows, at = call.rows(b, n, i), (b, lax.div(i, call.query_chunk // call.query))
    tokens, h = rows[1:3]
    scale = call.scale * LOG2E

    @pl.when(busy[at] > 0)
    def _():
        q_tile, q_tokens = q[rows], Tokens(q_pos[b, tokens], q_seg[b, tokens])

        def step(carry, j, masked):
            acc, row_max, row_sum = carry
            keys = call.keys(j)
            scores = call.dot(q_tile, k[b, h, keys, :], (1, 1))
            if masked:
                mask = attention_mask(q_tokens, Tokens(k_pos[b, keys], k_seg[b, keys]), call.window)
                scores = jnp.where(mask, scores, -jnp.inf)
            new_max = jnp.maximum(row_max, scores.max(1) * scale)  # >= MASK_VALUE, so that -inf has weight 0
            old, weights = jnp.exp2(row_max - new_max), jnp.exp2(scores * scale - new_max[:, None])
            acc = acc * old[:, None] + call.dot(weights.astype(v.dtype), v[b, h, keys, :], (1, 0))
            return acc, new_max, row_sum * old + weights.sum(1)

        lse_tile = lse[rows]
        attended = lse_tile > MASK_VALUE
        start = out[rows], jnp.where(attended, lse_tile * LOG2E, MASK_VALUE), attended.astype(jnp.float32)
        acc, row_max, row_sum = _visit((order, full, busy), at, call.key_chunk // call.key, step, start)
        attended = row_sum > 0
        row_sum = jnp.where(attended, row_sum, 1.0)
        new_out[rows] = acc / row_sum[:, None]
        new_lse[rows] = jnp.where(attended, (row_max + jnp.log2(row_sum)) / LOG2E, MASK_VALUE)


def attend(
    accumulator: tuple[jax.Array, jax.Array], queries: QueryBlock, block: KVBlock, chunks: Chunks,
    window: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """blockwise_attention.attend, fused: same arguments and results (out [B, T, K, G, H], lse [B, T, K, G]).

    chunks is the granularity at which pairs are skipped or left unmasked, rounded down to powers of two; 128
    is enough, because the kernel has its own tiles.

    Raises:
      ValueError: for a dtype or a head_dim that the kernel does not support.
    """
    call = _Call(FORWARD, queries, block, chunks, window)
    inputs = map(call.pad, (queries.q, block.k, block.v), 'qkk')
    results = [call.pad(x, 'q') for x in accumulator]
    out, lse = call.run(_attend, call.grid_of_queries(), _lists(call.classes), inputs, results)
    return out[:, :call.q_len], lse[:, :call.q_len]


def _attend_backward_q(
    call, order, full, busy, q_pos, q_seg, k_pos, k_seg, q, k, v, dout, lse, delta, dq, new_dq
):
    i, n, b = call.query_program()
    rows, at = call.rows(b, n, i), (b, lax.div(i, call.query_chunk // call.query))
    tokens, h = rows[1:3]

    @pl.when(busy[at] > 0)
    def _():
        q_tile, dout_tile = q[rows], dout[rows]
        q_tokens = Tokens(q_pos[b, tokens], q_seg[b, tokens])
        lse_tile, delta_tile = lse[rows][:, None] * LOG2E, delta[rows][:, None]

        def step(acc, j, masked):
            keys = call.keys(j)
            k_tile = k[b, h, keys, :]
            weights = jnp.exp2(call.dot(q_tile, k_tile, (1, 1)) * (call.scale * LOG2E) - lse_tile)
            if masked:
                mask = attention_mask(q_tokens, Tokens(k_pos[b, keys], k_seg[b, keys]), call.window)
                weights = jnp.where(mask, weights, 0.0)
            ds = weights * (call.dot(dout_tile, v[b, h, keys, :], (1, 1)) - delta_tile)
            return acc + call.dot(ds.astype(k.dtype), k_tile, (1, 0))

        acc = jnp.zeros((call.query * call.fold, call.head_dim), jnp.float32)
        acc = _visit((order, full, busy), at, call.key_chunk // call.key, step, acc)
        new_dq[rows] = dq[rows] + acc * call.scale


def _attend_backward_kv(
    call, order, full, busy, q_pos, q_seg, k_pos, k_seg, q, k, v, dout, lse, delta, dk, dv, new_dk, new_dv
):
    j, h, b = (pl.program_id(axis) for axis in range(3))
    keys, at = call.keys(j), (b, lax.div(j, call.key_chunk // call.key))

    @pl.when(busy[at] > 0)
    def _():
        k_tile, v_tile = k[b, h, keys, :], v[b, h, keys, :]
        k_tokens = Tokens(k_pos[b, keys], k_seg[b, keys])

        def bundle(n, carry):
            # Tiles are [keys, rows]: weights and ds are left operands without a transpose.
            def step(carry, i, masked):
                dk_tile, dv_tile = carry
                rows = call.rows(b, n, i)
                q_tile, dout_tile = q[rows], dout[rows]
                q_tokens = Tokens(q_pos[b, rows[1]], q_seg[b, rows[1]])
                lse_tile, delta_tile = lse[rows][None, :] * LOG2E, delta[rows][None, :]
                weights = jnp.exp2(call.dot(k_tile, q_tile, (1, 1)) * (call.scale * LOG2E) - lse_tile)
                if masked:
                    mask = attention_mask(q_tokens, k_tokens, call.window)
                    weights = jnp.where(mask.T, weights, 0.0)
                dv_tile += call.dot(weights.astype(q.dtype), dout_tile, (1, 0))
                ds = weights * (call.dot(v_tile, dout_tile, (1, 1)) - delta_tile)
                return dk_tile + call.dot(ds.astype(q.dtype), q_tile, (1, 0)), dv_tile

            return _visit((order, full, busy), at, call.query_chunk // call.query, step, carry)

        zero = jnp.zeros((call.key, call.head_dim), jnp.float32)
        dk_tile, dv_tile = lax.fori_loop(h * call.bundles, (h + 1) * call.bundles, bundle, (zero, zero))
        new_dk[b, h, keys, :] = dk[b, h, keys, :] + dk_tile * call.scale
        new_dv[b, h, keys, :] = dv[b, h, keys, :] + dv_tile


def attend_backward(
    grads: tuple[jax.Array, jax.Array, jax.Array], queries: QueryBlock, block: KVBlock, residuals: Residuals,
    chunks: Chunks, window: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """blockwise_attention.attend_backward, fused, with dq in the shape of q: one kernel for dq, one for dk
    and dv. Neither uses atomics, so the result is deterministic. chunks and errors as in attend."""
    call = _Call(BACKWARD, queries, block, chunks, window)
    (q, _), (k, v, _), (dout, lse, delta) = queries, block, residuals
    inputs = list(map(call.pad, (q, k, v, dout.astype(q.dtype), lse, delta), 'qkkqqq'))
    dq, dk, dv = map(call.pad, grads, 'qkk')
    lists_of_keys, lists_of_queries = _lists(call.classes), _lists(call.classes.swapaxes(1, 2))
    dq, = call.run(_attend_backward_q, call.grid_of_queries(), lists_of_keys, inputs, [dq])
    dk, dv = call.run(_attend_backward_kv, call.grid_of_keys(), lists_of_queries, inputs, [dk, dv])
    return dq[:, :call.q_len], dk[:, :, :call.k_len], dv[:, :, :call.k_len]


def init_dq(q: jax.Array) -> jax.Array:
    """Initial dq of attend_backward: float32 zeros in the shape of q [B, T, K, G, H]."""
    return jnp.zeros_like(q, jnp.float32)


def finalize_dq(dq: jax.Array, q: jax.Array) -> jax.Array:
    """dq after the last block, which already has the shape of q [B, T, K, G, H]."""
    return dq
