"""Double ring: rings inside nodes, a ring of nodes around them (LoongTrain, Gu et al. 2024, arXiv 2406.18485).

For clusters with fast links inside a machine and slow ones between. A block is sent to the next node once, while
it makes a whole turn of its present one, so the slow transfer has node_size hops of work to hide behind where the
single ring leaves it one.
"""

from lct.ops.blockwise_attention import Chunks, nothing
from lct.ops.context_parallel import Split, finished_dq, see, see_grad, split_attention, zero_dq
from lct.ops.ring_attention import turn, turn_grad


def double_ring_attention(
    q, k, v, positions, segment_ids, axis_name, node_size, chunks=Chunks(), window=None, kernel='xla'  # noqa: B008
):
    """As ring_attention, with nodes of node_size neighbours on axis_name."""
    return _attention(q, k, v, positions, segment_ids, Split(axis_name, node_size, chunks, window, kernel))


def _forward(queries, keys, how):
    look = lambda total, keys: see(total, queries, keys, how)
    inner = lambda total, keys: turn(total, keys, look, how.to_next_in_node, how.node_size)
    return turn(nothing(queries.q), keys, inner, how.to_next_node, how.num_nodes)


def _backward(queries, keys, cotangent, how):
    add = lambda grads, keys: see_grad(grads, queries, keys, cotangent, how)

    def inner(grads, keys):
        dq, dk, dv = grads
        dq, more_dk, more_dv = turn_grad(dq, keys, add, how.to_next_in_node, how.node_size, how.chunks.key)
        return dq, dk + more_dk, dv + more_dv

    dq, dk, dv = turn_grad(zero_dq(queries, how), keys, inner, how.to_next_node, how.num_nodes, how.chunks.key)
    return finished_dq(dq, queries, how), dk, dv


_attention = split_attention(_forward, _backward)
