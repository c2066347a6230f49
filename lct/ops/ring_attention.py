"""Ring Attention with Blockwise Transformers (Liu, Zaharia & Abbeel 2023, arXiv 2310.01889), section 3.

Every device keeps its queries and passes its key/value block around the ring. It starts with its own block,
so that each query has attended to itself and lse is finite, and it starts each transfer before it computes on
the present block, so that communication is overlapped with compute. Positions and segments rotate with the
block and are all that the mask needs: contiguous, zigzag and striped layouts are the same ring.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from lct.ops import context_parallel
from lct.ops.blockwise_attention import KVBlock, fit, init_accumulator, init_grads
from lct.ops.context_parallel import AttentionOptions, Directions


def ring_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, segment_ids: jax.Array,
    axis_name: str | None, options: AttentionOptions = AttentionOptions(),  # noqa: B008
) -> jax.Array:
    """Causal attention within documents over a sequence split on axis_name; call inside shard_map.

    The forward rotates the un-repeated key/value heads in their own dtype ring_size - 1 times. The backward
    needs (q, k, v, out, lse) alone; dk and dv rotate in float32 with their block, back to its owner.

    Args:
      q: [B, T, N, H] local queries; k, v: [B, T, K, H] local keys and values.
      positions, segment_ids: int32 [B, T]; segment 0 is padding.
      axis_name: mesh axis of the ring, or None on a single device.
      options: chunks, sliding window and kernel.
    Returns:
      [B, T, N, H] in q's dtype.
    Raises:
      ValueError: if N is not a multiple of K.
    """
    return _attention(q, k, v, positions, segment_ids, axis_name, options)


def ring_pass(
    accumulator: tuple[jax.Array, jax.Array], block: KVBlock, attend_block: Callable, rotate: Callable,
    size: int,
) -> tuple[jax.Array, jax.Array]:
    """(out [B, T, K, G, H], lse [B, T, K, G]) after the blocks of all devices on a ring of the given size.

    attend_block(accumulator, block) -> accumulator runs while rotate(block) transfers the next block.
    """
    def ring_step(carry, _):
        block, accumulator = carry
        next_block = rotate(block)
        return lax.optimization_barrier((next_block, attend_block(accumulator, block))), None

    if size > 1:
        (block, accumulator), _ = lax.scan(ring_step, (block, accumulator), length=size - 1)
    return attend_block(accumulator, block)


def ring_pass_backward(
    grads: tuple[jax.Array, jax.Array, jax.Array], block: KVBlock, attend_block_backward: Callable,
    rotate: Callable, size: int, chunk: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """grads, which are dq and the dk and dv [B, K, S, H] of the device's own block, with the share of a ring
    of the given size added.

    attend_block_backward((dq, dk, dv), block) -> (dq, dk, dv). A block rotates as two halves, its even and
    its odd chunks: while the device computes on one half, the other and its dk, dv are in flight. The
    device's own block is split too. Its second half comes first, which overlaps with the arrival of the first
    neighbour's half. Its first half comes last, which overlaps with the return of the second half's gradients
    to their owner. So every transfer is overlapped with compute, and none needs a second accumulator.
    """
    if size == 1:
        return attend_block_backward(grads, block)
    dq, *own_grads = grads
    first_grads, second_grads = _halves(own_grads, chunk)

    def accumulate(dq, half):
        block, grads = half
        dq, *grads = attend_block_backward((dq, *grads), block)
        return dq, (block, tuple(grads))

    def ring_step(carry, _):
        dq, first, second = carry
        in_flight = rotate(second)
        dq, first = accumulate(dq, first)
        # Nothing that follows may be scheduled into this half step: it would wait for the transfer.
        dq, first, second = lax.optimization_barrier((dq, first, in_flight))
        in_flight = rotate(first)
        dq, second = accumulate(dq, second)
        return lax.optimization_barrier((dq, in_flight, second)), None

    first, second = _halves(block, chunk)
    in_flight = rotate(first)
    dq, second = accumulate(dq, (second, second_grads))
    carry = dq, (in_flight, init_grads(first.k, first.v)), second
    (dq, first, (_, second_grads)), _ = lax.scan(ring_step, carry, length=size - 1)
    second_grads = rotate(second_grads)
    dq, (_, new_grads) = accumulate(dq, first)
    # Their return overlaps with this accumulation, not with later uses of dq.
    dq, second_grads = lax.optimization_barrier((dq, second_grads))
    first_grads = (a + b for a, b in zip(first_grads, new_grads))
    return dq, *(_interleave(a, b, block.k.shape[2], chunk) for a, b in zip(first_grads, second_grads))


def _halves(tree, chunk):
    """Even and odd chunks of arrays [B, K, S, ...]. An odd S is padded with one key that no query attends
    to."""
    length = jax.tree.leaves(tree)[0].shape[2]
    odd = length % 2
    size = fit(chunk, length + odd)

    def take(x, parity):
        batch, rows, length, *rest = x.shape
        x = jnp.pad(x, [(0, odd * (dim == 2)) for dim in range(x.ndim)])
        return x.reshape(batch, rows, -1, 2, size, *rest)[:, :, :, parity].reshape(batch, rows, -1, *rest)

    return jax.tree.map(lambda x: take(x, 0), tree), jax.tree.map(lambda x: take(x, 1), tree)


def _interleave(even, odd, length, chunk):
    """The inverse of _halves for dk or dv [B, K, S / 2, H]."""
    batch, heads, half, dim = even.shape
    size = fit(chunk, 2 * half)
    pair = [x.reshape(batch, heads, -1, size, dim) for x in (even, odd)]
    return jnp.stack(pair, 3).reshape(batch, heads, 2 * half, dim)[:, :, :length]


def _forward(queries, block, axis, options):
    attend_block = lambda accumulator, block: context_parallel.attend(accumulator, queries, block, options)
    return ring_pass(init_accumulator(queries.q), block, attend_block, axis.rotate, axis.size)


def _backward(queries, block, residuals, grads, axis, options):
    def attend_block(grads, block):
        return context_parallel.attend_backward(grads, queries, block, residuals, options)

    grads = context_parallel.init_dq(queries, options), *grads
    dq, dk, dv = ring_pass_backward(grads, block, attend_block, axis.rotate, axis.size, options.chunks.key)
    return context_parallel.finalize_dq(dq, queries, options), dk, dv


DIRECTIONS = Directions(_forward, _backward)
_attention = context_parallel.make_attention('ring_attention', *DIRECTIONS)
