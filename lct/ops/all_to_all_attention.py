"""Sequence parallelism by all-to-all: a node trades sequence shards for heads (DeepSpeed Ulysses, Jacobs et
al. 2023, arXiv 2309.14509), and a ring passes blocks between nodes (USP, Fang & Zhao 2024, arXiv 2405.07719).

Within a node each device computes num_heads / node_size heads over the tokens of the whole node. Key/value
heads are repeated only where the node has more devices than there are key/value heads.
"""

import jax
import jax.numpy as jnp
from jax import lax

from lct.ops import context_parallel
from lct.ops.blockwise_attention import KVBlock, QueryBlock, Residuals, init_accumulator, init_grads
from lct.ops.context_parallel import AttentionOptions, Directions
from lct.ops.masks import Tokens
from lct.ops.ring_attention import ring_pass, ring_pass_backward


def all_to_all_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, segment_ids: jax.Array,
    axis_name: str | None, options: AttentionOptions,
) -> jax.Array:
    """As ring_attention, with all-to-alls in nodes of options.node_size neighbours, and a ring of nodes.

    q: [B, T, N, H] local queries; k, v: [B, T, K, H]; positions, segment_ids: int32 [B, T] -> [B, T, N, H].

    Raises:
      ValueError: if node_size does not divide N, or neither divides K nor is a multiple of it.
    """
    heads, kv_heads, node_size = q.shape[2], k.shape[2], options.node_size
    if heads % node_size or (kv_heads % node_size and node_size % kv_heads):
        raise ValueError(
            f'all_to_all over {node_size} devices needs num_heads {heads} to be a multiple of {node_size} '
            f'and num_kv_heads {kv_heads} to be a multiple or a divisor of it (heads of one tensor shard); '
            'use a smaller node_size')
    return _attention(q, k, v, positions, segment_ids, axis_name, options)


def _exchange(x, axis, split_dim, join_dim):
    return lax.all_to_all(x, axis.name, split_dim, join_dim, tiled=True, axis_index_groups=axis.nodes)


def _to_heads(x, axis):
    """x [B, T, K, G, ...]: all heads of a sequence shard -> this device's heads of all tokens of the node."""
    batch, length, kv_heads, group, *rest = x.shape
    x = _exchange(x.reshape(batch, length, kv_heads * group, *rest), axis, 2, 1)
    return x.reshape(*x.shape[:2], max(kv_heads // axis.node_size, 1), -1, *rest)


def _to_tokens(x, axis, kv_heads):
    """The inverse of _to_heads."""
    batch, length, heads, group, *rest = x.shape
    x = _exchange(x.reshape(batch, length, heads * group, *rest), axis, 1, 2)
    return x.reshape(*x.shape[:2], kv_heads, -1, *rest)


def _gather_tokens(x, axis, token_dim):
    """An array without heads, gathered over the node."""
    return lax.all_gather(x, axis.name, axis=token_dim, tiled=True, axis_index_groups=axis.nodes)


def _node_queries(queries, axis):
    tokens = Tokens(*(_gather_tokens(x, axis, 1) for x in queries.tokens))
    return QueryBlock(_to_heads(queries.q, axis), tokens)


def _node_block(block, axis):
    copies = max(axis.node_size // block.k.shape[1], 1)
    exchange = lambda x: _exchange(jnp.repeat(x, copies, axis=1), axis, 1, 2)
    return KVBlock(exchange(block.k), exchange(block.v), _gather_tokens(block.stacked_tokens, axis, 2))


def _own_grad(x, axis, kv_heads):
    """dk or dv of the node's tokens -> of the device's shard [B, K, S, H], summed over copies of a head."""
    x = _exchange(x, axis, 2, 1)
    batch, heads, *rest = x.shape
    return x.reshape(batch, kv_heads, heads // kv_heads, *rest).sum(2)


def _forward(queries, block, axis, options):
    kv_heads = block.k.shape[1]
    queries, block = _node_queries(queries, axis), _node_block(block, axis)
    attend_block = lambda accumulator, block: context_parallel.attend(accumulator, queries, block, options)
    out, lse = ring_pass(init_accumulator(queries.q), block, attend_block, axis.rotate_nodes, axis.num_nodes)
    return _to_tokens(out, axis, kv_heads), _to_tokens(lse, axis, kv_heads)


def _backward(queries, block, residuals, grads, axis, options):
    kv_heads = block.k.shape[1]
    queries, block = _node_queries(queries, axis), _node_block(block, axis)
    residuals = Residuals(*(_to_heads(x, axis) for x in residuals))
    def attend_block(grads, block):
        return context_parallel.attend_backward(grads, queries, block, residuals, options)

    chunk = options.chunks.key
    node_grads = context_parallel.init_dq(queries, options), *init_grads(block.k, block.v)
    dq, *node_grads = ring_pass_backward(
        node_grads, block, attend_block, axis.rotate_nodes, axis.num_nodes, chunk)
    dq = context_parallel.finalize_dq(dq, queries, options)
    dk, dv = (a + _own_grad(b, axis, kv_heads) for a, b in zip(grads, node_grads))
    return _to_tokens(dq, axis, kv_heads), dk, dv


DIRECTIONS = Directions(_forward, _backward)
_attention = context_parallel.make_attention('all_to_all_attention', *DIRECTIONS)
