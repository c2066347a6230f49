"""Ring Attention with Blockwise Transformers (Liu, Zaharia & Abbeel 2023), section 3.

Every device keeps its queries and sends its key/value block around the ring. It starts on its own block,
so each query has seen itself, and starts the transfer of the next block before it computes on the
present one. Positions and segments travel with the block: the mask needs nothing else, so contiguous,
zigzag and striped layouts are one and the same ring.
"""

import jax
import jax.numpy as jnp
from jax import lax

from lct.ops.blockwise_attention import Chunks, fit, nothing, zero_grads
from lct.ops.context_parallel import Split, finished_dq, see, see_grad, split_attention, zero_dq


def ring_attention(
    q, k, v, positions, segment_ids, axis_name, chunks=Chunks(), window=None, kernel='xla'  # noqa: B008
):
    """Causal attention within documents over a sequence split on axis_name; call inside shard_map.

    Forward: ring_size - 1 rotations of the un-repeated key/value heads in their own dtype. Backward: from
    (q, k, v, out, lse) alone; dk and dv ride in float32 beside their block and come home.

    Args:
      q: [B, T, N, H] local queries; k, v: [B, T, K, H] local keys and values.
      positions, segment_ids: int32 [B, T]; segment 0 is padding.
      axis_name: mesh axis of the ring, or None on a single device.
      chunks: Chunks of one tile.
      window: tokens that a query sees, itself included; None for all before it.
      kernel: the inner block, a key of split_attention.KERNELS.
    Returns:
      [B, T, N, H] in q's dtype.
    Raises:
      ValueError: if N is not a multiple of K.
    """
    return _attention(q, k, v, positions, segment_ids, Split(axis_name, 1, chunks, window, kernel))


def turn(total, keys, see, rotate, size):
    """(out, lse) after the blocks of a whole ring: see(total, keys) -> total, while the next block arrives."""
    def hop(carry, _):
        keys, total = carry
        arriving = rotate(keys)
        return lax.optimization_barrier((arriving, see(total, keys))), None

    if size > 1:
        (keys, total), _ = lax.scan(hop, (keys, total), length=size - 1)
    return see(total, keys)


def turn_grad(dq, keys, add, rotate, size, chunk):
    """dq and the device's own dk, dv after a whole ring: add((dq, dk, dv), keys) -> (dq, dk, dv).

    A block travels as two halves, alternate chunks of it: while one is worked on, the other and its dk, dv are
    on their way. The device's own block comes in two as well: its late half first, behind which the first early
    half arrives, its early half last, behind which the gradients of the late one come home. So no transfer is
    without work to hide behind, and none needs a second accumulator.
    """
    zero = lambda keys: zero_grads(keys.k, keys.v)
    if size == 1:
        return add((dq, *zero(keys)), keys)

    def work(dq, half):
        keys, grads = half
        dq, *grads = add((dq, *grads), keys)
        return dq, (keys, tuple(grads))

    def hop(carry, _):
        dq, early, late = carry
        arriving = rotate(late)
        dq, early = work(dq, early)
        # nothing that follows may be drawn forward into this half hop: it would wait for the transfer
        dq, early, late = lax.optimization_barrier((dq, early, arriving))
        arriving = rotate(early)
        dq, late = work(dq, late)
        return lax.optimization_barrier((dq, arriving, late)), None

    early, late = _halves(keys, chunk)
    arriving = rotate(early)
    dq, late = work(dq, (late, zero(late)))
    carry = dq, (arriving, zero(early)), late
    (dq, early, (_, late_grads)), _ = lax.scan(hop, carry, length=size - 1)
    late_grads = rotate(late_grads)
    dq, (_, early_grads) = work(dq, early)
    # they come home behind this work, not behind what is done with dq after it
    dq, late_grads = lax.optimization_barrier((dq, late_grads))
    return dq, *(_joined(a, b, keys.k.shape[2], chunk) for a, b in zip(early_grads, late_grads))


def _halves(keys, chunk):
    """Even and odd chunks of a block; of an odd S with one key more, padding that nobody sees."""
    odd = keys.k.shape[2] % 2
    size = fit(chunk, keys.k.shape[2] + odd)

    def cut(x, i):
        batch, rows, length, *rest = x.shape
        x = jnp.pad(x, [(0, odd * (dim == 2)) for dim in range(x.ndim)])
        return x.reshape(batch, rows, -1, 2, size, *rest)[:, :, :, i].reshape(batch, rows, -1, *rest)

    return jax.tree.map(lambda x: cut(x, 0), keys), jax.tree.map(lambda x: cut(x, 1), keys)


def _joined(even, odd, length, chunk):
    """The inverse of _halves for dk or dv [B, K, S / 2, H]."""
    batch, heads, half, dim = even.shape
    size = fit(chunk, 2 * half)
    pair = [x.reshape(batch, heads, -1, size, dim) for x in (even, odd)]
    return jnp.stack(pair, 3).reshape(batch, heads, 2 * half, dim)[:, :, :length]


def _forward(queries, keys, how):
    return turn(nothing(queries.q), keys, lambda total, keys: see(total, queries, keys, how), how.to_next, how.size)


def _backward(queries, keys, cotangent, how):
    add = lambda grads, keys: see_grad(grads, queries, keys, cotangent, how)
    dq, dk, dv = turn_grad(zero_dq(queries, how), keys, add, how.to_next, how.size, how.chunks.key)
    return finished_dq(dq, queries, how), dk, dv


_attention = split_attention(_forward, _backward)
