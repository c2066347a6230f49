"""Ring Attention with Blockwise Transformers (Liu, Zaharia & Abbeel 2023), section 3.

Every device keeps its queries and sends its key/value block around the ring. It starts on its own block,
so each query has seen itself, and starts the transfer of the next block before it computes on the
present one. Positions and segments travel with the block: the mask needs nothing else, so contiguous,
zigzag and striped layouts are one and the same ring.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from lct.ops.blockwise_attention import NOTHING, Chunks, attend, attend_grad, dq_of, grad_buffers, merge


def rotate(block, axis_name):
    """Send a block to the next device of the ring and receive the previous one's."""
    size = lax.axis_size(axis_name)
    return jax.tree.map(
        lambda x: lax.ppermute(x, axis_name, [(i, (i + 1) % size) for i in range(size)]), block
    )


def ring_attention(q, k, v, positions, segment_ids, axis_name, chunks=Chunks()):  # noqa: B008
    """Causal attention within documents over a sequence split on axis_name; call inside shard_map.

    Forward: ring_size - 1 rotations of the un-repeated key/value heads in their own dtype. Backward: from
    (q, k, v, out, lse) alone; dk and dv ride in float32 beside their block and come home.

    Args:
      q: [B, T, N, H] local queries; k, v: [B, T, K, H] local keys and values.
      positions, segment_ids: int32 [B, T]; segment 0 is padding.
      axis_name: mesh axis of the ring, or None on a single device.
      chunks: Chunks of one tile.
    Returns:
      [B, T, N, H] in q's dtype.
    Raises:
      ValueError: if N is not a multiple of K.
    """
    if q.shape[2] % k.shape[2]:
        raise ValueError(f'num_heads {q.shape[2]} is not a multiple of num_kv_heads {k.shape[2]}')
    return _ring(q, k, v, positions, segment_ids, axis_name, chunks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _ring(q, k, v, positions, segment_ids, axis_name, chunks):
    return _forward(q, k, v, positions, segment_ids, axis_name, chunks)[0]


def _forward(q, k, v, positions, segment_ids, axis_name, chunks):
    def attend_block(block):
        k, v, k_positions, k_segments = block
        return attend(q, k, v, positions, k_positions, segment_ids, k_segments, chunks)

    def hop(carry, _):
        block, total = carry
        arriving = rotate(block, axis_name)
        return (arriving, merge(total, attend_block(block))), None

    block = (k, v, positions, segment_ids)
    if axis_name is None or lax.axis_size(axis_name) == 1:
        out, lse = attend_block(block)
    else:
        total = (jnp.zeros_like(q, jnp.float32), jnp.full_like(q[..., 0], NOTHING, jnp.float32))
        (block, total), _ = lax.scan(hop, (block, total), length=lax.axis_size(axis_name) - 1)
        out, lse = merge(total, attend_block(block))
    out, lse = checkpoint_name((out.astype(q.dtype), lse), 'attention')
    kept = checkpoint_name((q, k, v), 'attention')
    return out, (*kept, positions, segment_ids, out, lse)


def _backward(axis_name, chunks, kept, dout):
    q, k, v, positions, segment_ids, out, lse = kept
    delta = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), -1)

    def add_block(grads, block):
        k, v, k_positions, k_segments = block
        return attend_grad(
            grads, q, k, v, dout, lse, delta, positions, k_positions, segment_ids, k_segments, chunks
        )

    def hop(carry, _):
        block, grads = carry
        arriving = rotate(block, axis_name)
        dq, dk, dv = add_block(grads, block)
        return (arriving, (dq, *rotate((dk, dv), axis_name))), None

    block, grads = (k, v, positions, segment_ids), grad_buffers(q, k)
    if axis_name is None or lax.axis_size(axis_name) == 1:
        dq, dk, dv = add_block(grads, block)
    else:
        (block, grads), _ = lax.scan(hop, (block, grads), length=lax.axis_size(axis_name) - 1)
        dq, dk, dv = add_block(grads, block)
        dk, dv = rotate((dk, dv), axis_name)
    return dq_of(dq).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None


_ring.defvjp(_forward, _backward)
