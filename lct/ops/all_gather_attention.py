"""Context parallelism by all-gather: every device fetches the keys and values of its node (Llama Team 2024,
section 3.3.2: Llama-3 405B at 128K), and nodes pass theirs on around a ring.

With one node for all it is the plain all-gather: one collective, exposed, and keys and values of the whole
sequence on every device. With smaller nodes only a shard per device crosses the slow links, behind the work.
"""

import jax
from jax import lax

from lct.ops.blockwise_attention import Chunks, nothing, zero_grads
from lct.ops.context_parallel import Split, finished_dq, see, see_grad, split_attention, zero_dq
from lct.ops.ring_attention import turn, turn_grad


def all_gather_attention(
    q, k, v, positions, segment_ids, axis_name, node_size, chunks=Chunks(), window=None, kernel='xla'  # noqa: B008
):
    """As ring_attention, but gathers inside nodes of node_size neighbours and rings across them."""
    return _attention(q, k, v, positions, segment_ids, Split(axis_name, node_size, chunks, window, kernel))


def _gathered(keys, how):
    """The keys of all devices of the node."""
    join = lambda x: lax.all_gather(x, how.axis_name, axis=2, tiled=True, axis_index_groups=how.nodes)
    return jax.tree.map(join, keys)


def _scattered(x, how):
    """Each device's share of the sum over the node of dk or dv [B, K, S, H], float32."""
    return lax.psum_scatter(
        x, how.axis_name, scatter_dimension=2, tiled=True, axis_index_groups=how.nodes)


def _forward(queries, keys, how):
    look = lambda total, keys: see(total, queries, _gathered(keys, how), how)
    return turn(nothing(queries.q), keys, look, how.to_next_node, how.num_nodes)


def _backward(queries, keys, cotangent, how):
    def add(grads, keys):
        dq, dk, dv = grads
        keys = _gathered(keys, how)
        dq, *more = see_grad((dq, *zero_grads(keys.k, keys.v)), queries, keys, cotangent, how)
        more_dk, more_dv = (_scattered(x, how) for x in more)
        return dq, dk + more_dk, dv + more_dv

    dq, dk, dv = turn_grad(zero_dq(queries, how), keys, add, how.to_next_node, how.num_nodes, how.chunks.key)
    return finished_dq(dq, queries, how), dk, dv


_attention = split_attention(_forward, _backward)
