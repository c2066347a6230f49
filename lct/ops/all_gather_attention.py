"""Context parallelism by all-gather: every device gathers the keys and values of its node (Llama Team 2024,
arXiv 2407.21783, section 3.3.2: Llama-3 405B at 128K), and a ring passes blocks between nodes.

With a single node this is the plain all-gather: its communication is exposed, and every device holds the
keys and values of the whole sequence. With smaller nodes one shard per device crosses the slow links,
overlapped with compute.
"""

import jax
from jax import lax

from lct.ops import context_parallel
from lct.ops.blockwise_attention import init_accumulator, init_grads
from lct.ops.context_parallel import AttentionOptions, Directions
from lct.ops.ring_attention import ring_pass, ring_pass_backward


def all_gather_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, segment_ids: jax.Array,
    axis_name: str | None, options: AttentionOptions,
) -> jax.Array:
    """As ring_attention, with all-gathers in nodes of options.node_size neighbours, and a ring of nodes.

    q: [B, T, N, H] local queries; k, v: [B, T, K, H]; positions, segment_ids: int32 [B, T] -> [B, T, N, H].
    """
    return _attention(q, k, v, positions, segment_ids, axis_name, options)


def _gather(block, axis):
    """The key/value block of the whole node."""
    gather = lambda x: lax.all_gather(x, axis.name, axis=2, tiled=True, axis_index_groups=axis.nodes)
    return jax.tree.map(gather, block)


def _scatter(x, axis):
    """Sum float32 dk or dv [B, K, S, H] over the node's devices, scattered to the owners of the keys."""
    return lax.psum_scatter(x, axis.name, scatter_dimension=2, tiled=True, axis_index_groups=axis.nodes)


def _forward(queries, block, axis, options):
    def attend_block(accumulator, block):
        return context_parallel.attend(accumulator, queries, _gather(block, axis), options)

    return ring_pass(init_accumulator(queries.q), block, attend_block, axis.rotate_nodes, axis.num_nodes)


def _backward(queries, block, residuals, grads, axis, options):
    def attend_block(grads, block):
        dq, dk, dv = grads
        block = _gather(block, axis)
        grads = dq, *init_grads(block.k, block.v)
        dq, *node_grads = context_parallel.attend_backward(grads, queries, block, residuals, options)
        own_dk, own_dv = (_scatter(x, axis) for x in node_grads)
        return dq, dk + own_dk, dv + own_dv

    grads, chunk = (context_parallel.init_dq(queries, options), *grads), options.chunks.key
    dq, dk, dv = ring_pass_backward(grads, block, attend_block, axis.rotate_nodes, axis.num_nodes, chunk)
    return context_parallel.finalize_dq(dq, queries, options), dk, dv


DIRECTIONS = Directions(_forward, _backward)
_attention = context_parallel.make_attention('all_gather_attention', *DIRECTIONS)
