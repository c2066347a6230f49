"""The inner block as fused kernels for Hopper: Pallas through Mosaic, which stays where Triton is deprecated.

Contract, masks and chunk classes are those of lct.ops.blockwise_attention; the algorithm is FlashAttention-2
(Dao 2023, arXiv 2307.08691), laid out as FlashAttention-3 (Shah et al. 2024, arXiv 2407.08608): one warpgroup
fetches tiles into shared memory while two others multiply them. As in triton_attention a kernel visits the
blocks of a list, FULL ones first, then MIXED ones; EMPTY blocks are left out.

No card has run it: it is compared with blockwise_attention by interpretation and compiled ahead of time, and
'auto' never chooses it. jax's own Mosaic kernel refuses masks with CUDA 12.8.0 to 12.9.0, whose assembler
miscompiles them; use CUDA 12.9.1 or newer.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mosaic

from lct.ops.blockwise_attention import LOG2E, MASK_VALUE, Chunks, KVBlock, QueryBlock, Residuals
from lct.ops.kernels import mosaic_tiles as tiles
from lct.ops.kernels.triton_attention import finalize_dq as finalize_dq
from lct.ops.kernels.triton_attention import init_dq as init_dq
from lct.ops.masks import EMPTY, FULL, Tokens, chunk_classes

DTYPES = ('bfloat16', 'float16')
HEAD_DIMS = (64, 128)
CAPABILITIES = 9.0, 10.0  # of a CUDA device, from and below: Hopper alone has these matrix instructions
FORWARD, BACKWARD = 128, 64  # keys of a tile, or queries; of scores and ds a thread holds that many registers
TILE = mosaic.Layout.WGMMA


class _Call:
    """One call divided into blocks: padded arguments, their sizes, and the order of a kernel's visits."""

    def __init__(self, queries, block, window):
        q = queries.q
        self.q_len, self.kv_heads, self.group, self.head_dim = q.shape[1:]
        self.k_len, self.dtype, self.window = block.k.shape[2], q.dtype, window
        if q.dtype.name not in DTYPES or self.head_dim not in HEAD_DIMS:
            raise ValueError(
                f'the mosaic kernel takes {", ".join(DTYPES)} and head_dim {", ".join(map(str, HEAD_DIMS))}, '
                f"got {q.dtype.name} and {self.head_dim}; use kernel 'xla'")
        self.scale = self.head_dim**-0.5
        self.q_tokens = jnp.stack([_pad(x, 1) for x in queries.tokens], 1)  # [B, 2, T]
        self.k_tokens = _pad(block.stacked_tokens, 2)
        q_tokens, k_tokens = (Tokens(*x.swapaxes(0, 1)) for x in (self.q_tokens, self.k_tokens))
        self.classes = chunk_classes(q_tokens, k_tokens, tiles.BLOCK, tiles.BLOCK, window)

    def heads(self, x):
        """x [B, T, K, G, H] in the tiles of a kernel: [B, T, N, H], padded."""
        return _pad(x.reshape(*x.shape[:2], -1, self.head_dim), 1)

    def rows(self, x):
        """x [B, T, K, G] with the numbers of a head contiguous: [B, N, T], padded."""
        return _pad(x.reshape(*x.shape[:2], -1).swapaxes(1, 2), 2)

    def from_rows(self, x):
        """x [B, N, T] as rows made it, in the shape [B, T, K, G]."""
        return x.swapaxes(1, 2)[:, :self.q_len].reshape(x.shape[0], self.q_len, self.kv_heads, self.group)

    def from_heads(self, x):
        """x [B, T, N, H] as heads made it, in the shape [B, T, K, G, H]."""
        return x[:, :self.q_len].reshape(x.shape[0], self.q_len, self.kv_heads, self.group, self.head_dim)

    def memory(self, *lead):
        """Shared memory for tiles [*lead, H] as the matrix instruction reads them."""
        return mosaic.SMEM((*lead, self.head_dim), self.dtype,
                           transforms=(mosaic.TilingTransform((8, 64)), mosaic.SwizzleTransform(128)))

    def run(self, kernel, heads, lists, inputs, results, scratch):
        """The new results after a kernel with a program for each block, head and batch row."""
        batch, blocks = lists[0].shape[:2]
        new = mosaic.kernel(
            functools.partial(kernel, self),
            out_type=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results],
            grid=(blocks, heads, batch), grid_names=('block', 'head', 'batch'),
            num_threads=3, thread_name='warpgroup', scratch_types=scratch, interpret=tiles.INTERPRET,
            compiler_params=mosaic.CompilerParams(approx_math=True), kernel_name=kernel.__name__.strip('_'),
        )(*lists, self.q_tokens, self.k_tokens, *inputs, *results)
        # Inside shard_map a result varies over the mesh axes of its initial value; the kernel forgets them.
        axes = [tuple(sorted(jax.typeof(x).mat.varying)) for x in results]
        return [lax.pcast(x, names, to='varying') for x, names in zip(new, axes)]


def _pad(x, dim):
    """x padded to whole blocks along dim: tokens of segment 0."""
    return jnp.pad(x, [(0, -x.shape[dim] % tiles.BLOCK * (i == dim)) for i in range(x.ndim)])


def _lists(classes):
    """classes [B, blocks, blocks to visit] -> order of visits, number of FULL ones, number of non-EMPTY."""
    return (jnp.argsort(-classes, axis=2).astype(jnp.int32), (classes == FULL).sum(2, dtype=jnp.int32),
            (classes > EMPTY).sum(2, dtype=jnp.int32))


def _attend(call, order, full, busy, q_tokens, k_tokens, q, k, v, out, lse, new_out, new_lse,
            q_tiles, k_tiles, v_tiles, own, ready, free):
    i, n, b = tiles.program(last_first=True)
    h, scale = lax.div(n, call.group), call.scale * LOG2E
    visits = tiles.Visits((order, full, busy), (b, i), tiles.BLOCK // FORWARD)

    def copies(_, j):
        keys = pl.ds(j * FORWARD, FORWARD)
        return (k.at[b, h, keys], k_tiles), (v.at[b, h, keys], v_tiles)

    def compute(number):
        rows = pl.ds(i * tiles.BLOCK + number * tiles.ROWS, tiles.ROWS)
        tiles.fetch_own(own, number, (q.at[b, rows, n], q_tiles))
        own_tokens = tiles.load_tokens(q_tokens, b, rows, tiles.ROW)

        def step(carry, j, slot, masked):
            acc, row_max, row_sum = carry
            scores = tiles.dot(q_tiles.at[number], k_tiles.at[slot])
            if masked:
                keys = tiles.load_tokens(k_tokens, b, pl.ds(j * FORWARD, FORWARD), tiles.COLUMN)
                mask = tiles.attention_mask(own_tokens, keys, scores.shape, call.window)
                scores = jnp.where(mask, scores, -jnp.inf)
            new_max = jnp.maximum(row_max, scores.max(1) * scale)  # >= MASK_VALUE, so that -inf has weight 0
            weights = jnp.exp2(scores * scale - tiles.over_rows(new_max, scores))
            old = jnp.exp2(row_max - new_max)
            acc = tiles.add_dot(acc * tiles.over_rows(old, acc), weights, v_tiles.at[slot])
            return acc, new_max, row_sum * old + weights.sum(1)

        zero, one = tiles.full((tiles.ROWS,), 0.0), tiles.full((tiles.ROWS,), 1.0)
        row_max = tiles.load(lse.at[b, n, rows], tiles.ROW) * LOG2E
        attended = row_max > MASK_VALUE
        # Inside shard_map what is loaded varies over mesh axes, to jax, and products do not: a sum does not.
        acc = tiles.load(out.at[b, rows, n], TILE) + tiles.full((tiles.ROWS, call.head_dim), 0.0)
        start = acc, jnp.where(attended, row_max, zero + MASK_VALUE), jnp.where(attended, one, zero)
        acc, row_max, row_sum = visits.over(step, start, ready, free)
        attended = row_sum > 0
        row_sum = jnp.where(attended, row_sum, one)
        new_out.at[b, rows, n][...] = acc / tiles.over_rows(row_sum, acc)
        new_lse.at[b, n, rows][...] = jnp.where(
            attended, row_max / LOG2E + jnp.log(row_sum), zero + MASK_VALUE)

    tiles.divide(lambda: visits.fetch(copies, ready, free), compute)


def _attend_backward_q(call, order, full, busy, q_tokens, k_tokens, q, k, v, dout, lse, delta, dq, new_dq,
                       q_tiles, dout_tiles, k_tiles, v_tiles, own, ready, free):
    i, n, b = tiles.program(last_first=True)
    h = lax.div(n, call.group)
    visits = tiles.Visits((order, full, busy), (b, i), tiles.BLOCK // BACKWARD)

    def copies(_, j):
        keys = pl.ds(j * BACKWARD, BACKWARD)
        return (k.at[b, h, keys], k_tiles), (v.at[b, h, keys], v_tiles)

    def compute(number):
        rows = pl.ds(i * tiles.BLOCK + number * tiles.ROWS, tiles.ROWS)
        tiles.fetch_own(own, number, (q.at[b, rows, n], q_tiles), (dout.at[b, rows, n], dout_tiles))
        own_tokens = tiles.load_tokens(q_tokens, b, rows, tiles.ROW)
        lse_tile, delta_tile = (tiles.load(x.at[b, n, rows], tiles.ROW) for x in (lse, delta))
        lse_tile *= LOG2E

        def step(acc, j, slot, masked):
            scores = tiles.dot(q_tiles.at[number], k_tiles.at[slot])
            weights = jnp.exp2(scores * (call.scale * LOG2E) - tiles.over_rows(lse_tile, scores))
            if masked:
                keys = tiles.load_tokens(k_tokens, b, pl.ds(j * BACKWARD, BACKWARD), tiles.COLUMN)
                mask = tiles.attention_mask(own_tokens, keys, scores.shape, call.window)
                weights = jnp.where(mask, weights, 0.0)
            dweights = tiles.dot(dout_tiles.at[number], v_tiles.at[slot])
            ds = weights * (dweights - tiles.over_rows(delta_tile, scores))
            return tiles.add_dot(acc, ds, k_tiles.at[slot])

        acc = visits.over(step, tiles.full((tiles.ROWS, call.head_dim), 0.0), ready, free)
        new_dq.at[b, rows, n][...] = tiles.load(dq.at[b, rows, n], TILE) + acc * call.scale

    tiles.divide(lambda: visits.fetch(copies, ready, free), compute)


def _attend_backward_kv(call, order, full, busy, q_tokens, k_tokens, q, k, v, dout, lse, delta, dk, dv,
                        new_dk, new_dv, k_tiles, v_tiles, q_tiles, dout_tiles, lse_tiles, delta_tiles,
                        own, ready, free):
    j, h, b = tiles.program()
    visits = tiles.Visits((order, full, busy), (b, j), tiles.BLOCK // BACKWARD, repeats=call.group)

    def copies(repeat, i):
        n, rows = h * call.group + repeat, pl.ds(i * BACKWARD, BACKWARD)
        return ((q.at[b, rows, n], q_tiles), (dout.at[b, rows, n], dout_tiles),
                (lse.at[b, n, rows], lse_tiles), (delta.at[b, n, rows], delta_tiles))

    def compute(number):
        keys = pl.ds(j * tiles.BLOCK + number * tiles.ROWS, tiles.ROWS)
        tiles.fetch_own(own, number, (k.at[b, h, keys], k_tiles), (v.at[b, h, keys], v_tiles))
        own_tokens = tiles.load_tokens(k_tokens, b, keys, tiles.ROW)

        def step(carry, i, slot, masked):
            # Tiles are [keys, rows]: weights and ds are left operands without a transpose.
            dk_tile, dv_tile = carry
            scores = tiles.dot(k_tiles.at[number], q_tiles.at[slot])
            over = lambda x: lax.broadcast_in_dim(tiles.load(x.at[slot], tiles.COLUMN), scores.shape, [1])
            weights = jnp.exp2(scores * (call.scale * LOG2E) - over(lse_tiles) * LOG2E)
            if masked:
                rows = tiles.load_tokens(q_tokens, b, pl.ds(i * BACKWARD, BACKWARD), tiles.COLUMN)
                mask = tiles.attention_mask(rows, own_tokens, scores.shape, call.window, keys_dim=0)
                weights = jnp.where(mask, weights, 0.0)
            dv_tile = tiles.add_dot(dv_tile, weights, dout_tiles.at[slot])
            dweights = tiles.dot(v_tiles.at[number], dout_tiles.at[slot])
            ds = weights * (dweights - over(delta_tiles))
            return tiles.add_dot(dk_tile, ds, q_tiles.at[slot]), dv_tile

        zero = tiles.full((tiles.ROWS, call.head_dim), 0.0)
        dk_tile, dv_tile = visits.over(step, (zero, zero), ready, free)
        for new, old, tile in ((new_dk, dk, dk_tile * call.scale), (new_dv, dv, dv_tile)):
            new.at[b, h, keys][...] = tiles.load(old.at[b, h, keys], TILE) + tile

    tiles.divide(lambda: visits.fetch(copies, ready, free), compute)


def attend(
    accumulator: tuple[jax.Array, jax.Array], queries: QueryBlock, block: KVBlock, chunks: Chunks,
    window: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """blockwise_attention.attend, fused: same arguments and results (out [B, T, K, G, H], lse [B, T, K, G]).

    chunks are not used: pairs of 128 x 128 tokens are skipped or left unmasked.

    Raises:
      ValueError: for a dtype or a head_dim that the kernel does not support.
    """
    call = _Call(queries, block, window)
    (out, lse), (k, v) = accumulator, (_pad(x, 2) for x in block[:2])
    scratch = [call.memory(2, tiles.ROWS), *[call.memory(tiles.STAGES, FORWARD)] * 2, *tiles.barriers(1, 2)]
    out, lse = call.run(_attend, call.kv_heads * call.group, _lists(call.classes),
                        [call.heads(queries.q), k, v], [call.heads(out), call.rows(lse)], scratch)
    return call.from_heads(out), call.from_rows(lse)


def attend_backward(
    grads: tuple[jax.Array, jax.Array, jax.Array], queries: QueryBlock, block: KVBlock, residuals: Residuals,
    chunks: Chunks, window: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """blockwise_attention.attend_backward, fused, with dq in the shape of q: one kernel for dq, one for dk
    and dv. Neither uses atomics, so the result is deterministic. chunks and errors as in attend."""
    call = _Call(queries, block, window)
    (dq, *dkv), (dout, lse, delta) = grads, residuals
    inputs = [call.heads(queries.q), *(_pad(x, 2) for x in block[:2]), call.heads(dout.astype(call.dtype)),
              call.rows(lse), call.rows(delta)]
    own, moving = call.memory(2, tiles.ROWS), call.memory(tiles.STAGES, BACKWARD)
    numbers = mosaic.SMEM((tiles.STAGES, BACKWARD), jnp.float32)
    dq, = call.run(_attend_backward_q, call.kv_heads * call.group, _lists(call.classes), inputs,
                   [call.heads(dq)], [own, own, moving, moving, *tiles.barriers(2, 2)])
    dk, dv = call.run(_attend_backward_kv, call.kv_heads, _lists(call.classes.swapaxes(1, 2)), inputs,
                      [_pad(x, 2) for x in dkv],
                      [own, own, moving, moving, numbers, numbers, *tiles.barriers(2, 4)])
    return call.from_heads(dq), dk[:, :, :call.k_len], dv[:, :, :call.k_len]
