"""Sequence parallelism by all-to-all: a node trades sequence shards for heads (DeepSpeed Ulysses, Jacobs et al.
2023, arXiv 2309.14509), and nodes pass their keys on around a ring (USP, Fang & Zhao 2024, arXiv 2405.07719).

Inside a node each device attends with num_heads / node_size heads to the node's whole stretch. Key/value heads
are repeated only where the node is larger than their number.
"""

import jax.numpy as jnp
from jax import lax

from lct.ops.blockwise_attention import Chunks, nothing
from lct.ops.context_parallel import (
    Cotangent,
    Keys,
    Queries,
    Split,
    finished_dq,
    see,
    see_grad,
    split_attention,
    zero_dq,
)
from lct.ops.ring_attention import turn, turn_grad


def all_to_all_attention(
    q, k, v, positions, segment_ids, axis_name, node_size, chunks=Chunks(), window=None, kernel='xla'  # noqa: B008
):
    """As ring_attention, but all-to-all inside nodes of node_size neighbours and a ring across them.

    Raises:
      ValueError: if node_size does not divide N, or neither divides K nor is a multiple of it.
    """
    heads, kv_heads = q.shape[2], k.shape[2]
    if heads % node_size or (kv_heads % node_size and node_size % kv_heads):
        raise ValueError(
            f'all_to_all over {node_size} devices needs num_heads {heads} to be a multiple of it and num_kv_heads '
            f'{kv_heads} to be a multiple or a divisor of it (heads of one tensor shard); use a smaller node_size')
    return _attention(q, k, v, positions, segment_ids, Split(axis_name, node_size, chunks, window, kernel))


def _exchange(x, how, split_dim, join_dim):
    return lax.all_to_all(x, how.axis_name, split_dim, join_dim, tiled=True, axis_index_groups=how.nodes)


def _to_heads(x, how):
    """x [B, T, K, G, ...], all heads of a shard -> some heads of the node's stretch, grouped likewise."""
    batch, length, kv_heads, group, *rest = x.shape
    x = _exchange(x.reshape(batch, length, kv_heads * group, *rest), how, 2, 1)
    return x.reshape(*x.shape[:2], max(kv_heads // how.node_size, 1), -1, *rest)


def _to_tokens(x, how, kv_heads):
    """The inverse of _to_heads."""
    batch, length, heads, group, *rest = x.shape
    x = _exchange(x.reshape(batch, length, heads * group, *rest), how, 1, 2)
    return x.reshape(*x.shape[:2], kv_heads, -1, *rest)


def _joined(x, how, token_dim):
    """What has no heads: that of all devices of the node."""
    return lax.all_gather(x, how.axis_name, axis=token_dim, tiled=True, axis_index_groups=how.nodes)


def _node_queries(queries, how):
    return Queries(_to_heads(queries.q, how), *(_joined(x, how, 1) for x in queries[1:]))


def _node_keys(keys, how):
    copies = max(how.node_size // keys.k.shape[1], 1)
    share = lambda x: _exchange(jnp.repeat(x, copies, axis=1), how, 1, 2)
    return Keys(share(keys.k), share(keys.v), _joined(keys.tokens, how, 2))


def _own_grad(x, how, kv_heads):
    """dk or dv of the node's stretch -> of the device's shard [B, K, S, H], copies of a head summed."""
    x = _exchange(x, how, 2, 1)
    batch, heads, *rest = x.shape
    return x.reshape(batch, kv_heads, heads // kv_heads, *rest).sum(2)


def _forward(queries, keys, how):
    kv_heads = keys.k.shape[1]
    queries, keys = _node_queries(queries, how), _node_keys(keys, how)
    look = lambda total, keys: see(total, queries, keys, how)
    total = turn(nothing(queries.q), keys, look, how.to_next_node, how.num_nodes)
    return tuple(_to_tokens(x, how, kv_heads) for x in total)


def _backward(queries, keys, cotangent, how):
    kv_heads = keys.k.shape[1]
    queries, keys = _node_queries(queries, how), _node_keys(keys, how)
    cotangent = Cotangent(*(_to_heads(x, how) for x in cotangent))
    add = lambda grads, keys: see_grad(grads, queries, keys, cotangent, how)
    dq, dk, dv = turn_grad(
        zero_dq(queries, how), keys, add, how.to_next_node, how.num_nodes, how.chunks.key)
    dq = finished_dq(dq, queries, how)
    return _to_tokens(dq, how, kv_heads), _own_grad(dk, how, kv_heads), _own_grad(dv, how, kv_heads)


_attention = split_attention(_forward, _backward)
