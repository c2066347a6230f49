"""Double ring: a ring within each node, and a ring of nodes (LoongTrain, Gu et al. 2024, arXiv 2406.18485).

For clusters with fast links inside a machine and slow ones between machines. A block is sent to the next node
once per ring pass within its present node, so that the slow transfer overlaps with the attention of node_size
blocks. A single ring overlaps it with the attention of one block.
"""

import jax

from lct.ops import context_parallel
from lct.ops.blockwise_attention import init_accumulator
from lct.ops.context_parallel import AttentionOptions, Directions
from lct.ops.ring_attention import ring_pass, ring_pass_backward


def double_ring_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, segment_ids: jax.Array,
    axis_name: str | None, options: AttentionOptions,
) -> jax.Array:
    """As ring_attention, with nodes of options.node_size neighbours on axis_name.

    q: [B, T, N, H] local queries; k, v: [B, T, K, H]; positions, segment_ids: int32 [B, T] -> [B, T, N, H].
    """
    return _attention(q, k, v, positions, segment_ids, axis_name, options)


def _forward(queries, block, axis, options):
    attend_block = lambda accumulator, block: context_parallel.attend(accumulator, queries, block, options)

    def node_pass(accumulator, block):
        return ring_pass(accumulator, block, attend_block, axis.rotate_within_node, axis.node_size)

    return ring_pass(init_accumulator(queries.q), block, node_pass, axis.rotate_nodes, axis.num_nodes)


def _backward(queries, block, residuals, grads, axis, options):
    def attend_block(grads, block):
        return context_parallel.attend_backward(grads, queries, block, residuals, options)

    rotate, chunk = axis.rotate_within_node, options.chunks.key

    def node_pass(grads, block):
        return ring_pass_backward(grads, block, attend_block, rotate, axis.node_size, chunk)

    grads = context_parallel.init_dq(queries, options), *grads
    dq, dk, dv = ring_pass_backward(grads, block, node_pass, axis.rotate_nodes, axis.num_nodes, chunk)
    return context_parallel.finalize_dq(dq, queries, options), dk, dv


DIRECTIONS = Directions(_forward, _backward)
_attention = context_parallel.make_attention('double_ring_attention', *DIRECTIONS)
