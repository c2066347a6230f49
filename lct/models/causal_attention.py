"""Attention of a batch to itself on the current mesh: the strategies of lct.ops under shard_map.

Letters as in lct.sharding.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lct import sharding
from lct.ops import strategies
from lct.ops.blockwise_attention import KVBlock, QueryBlock, Residuals
from lct.ops.masks import Tokens
from lct.ops.strategies import Attention


class Keys(NamedTuple):
    """Keys and values of the whole sequence, heads first."""

    k: jax.Array  # [B, K, S, H]
    v: jax.Array  # [B, K, S, H]
    tokens: Tokens  # [B, S]


def attention(q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, segment_ids: jax.Array,
              split: Attention, window: int | None = None) -> jax.Array:
    """Causal attention within documents: q [B, T, N, H], k and v [B, T, K, H] -> [B, T, N, H].

    positions, segment_ids: int32 [B, T]. split: how the sequence is split over the current mesh.
    """
    local = functools.partial(strategies.attend, attention=split, window=window)
    return _on_mesh(local, ('BTNH', 'BTKH', 'BTKH', 'BT', 'BT'), 'BTNH')(q, k, v, positions, segment_ids)


def attend(q: jax.Array, q_tokens: Tokens, keys: Keys, split: Attention,
           window: int | None = None) -> tuple[jax.Array, jax.Array]:
    """Attention of some of the queries, q [B, T, N, H] at q_tokens [B, T], to all keys; it has no gradient.

    Returns:
      out [B, T, N, H] in q's dtype and lse [B, T, N] in float32, over all keys.
    """
    def local(q, q_tokens, keys, axis_name):
        queries, block = _blocks(q, q_tokens, keys)
        out, lse = strategies.attend_queries(queries, block, axis_name, split, window)
        return out.reshape(q.shape).astype(q.dtype), lse.reshape(q.shape[:3])

    return _on_mesh(local, ('BTNH', TOKENS, KEYS), ('BTNH', 'BTN'))(q, q_tokens, keys)


def attend_backward(q: jax.Array, q_tokens: Tokens, keys: Keys, residuals: tuple[jax.Array, ...],
                    grads: tuple[jax.Array, jax.Array], split: Attention, window: int | None = None,
                    ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of attend: dq [B, T, N, H] in q's dtype, and grads, which are the float32 dk and dv
    [B, K, S, H] of other queries, with the share of these added.

    residuals: out [B, T, N, H], lse [B, T, N] and the cotangent of out.
    """
    def local(q, q_tokens, keys, residuals, grads, axis_name):
        (out, lse, dout), (queries, block) = residuals, _blocks(q, q_tokens, keys)
        delta = jnp.sum(dout.astype(lse.dtype) * out.astype(lse.dtype), -1)
        shape = queries.q.shape
        residuals = Residuals(dout.reshape(shape), lse.reshape(shape[:-1]), delta.reshape(shape[:-1]))
        dq, dk, dv = strategies.attend_queries_backward(
            queries, block, residuals, grads, axis_name, split, window)
        return dq.reshape(q.shape).astype(q.dtype), dk, dv

    inputs = 'BTNH', TOKENS, KEYS, ('BTNH', 'BTN', 'BTNH'), ('BKSH', 'BKSH')
    return _on_mesh(local, inputs, ('BTNH', 'BKSH', 'BKSH'))(q, q_tokens, keys, residuals, grads)


TOKENS = Tokens('BT', 'BT')
KEYS = Keys('BKSH', 'BKSH', Tokens('BS', 'BS'))


def _on_mesh(local: Callable, inputs: Any, outputs: Any) -> Callable:
    """local(*args, axis_name) on the shards of every device; inputs and outputs: letters of the arrays."""
    if sharding.current_mesh() is None:
        return functools.partial(local, axis_name=None)
    specs = functools.partial(jax.tree.map, sharding.spec)
    return jax.shard_map(functools.partial(local, axis_name='sequence'), in_specs=specs(inputs),
                         out_specs=specs(outputs))


def _blocks(q, q_tokens, keys):
    """q [B, T, N, H] as a QueryBlock, and the KVBlock of the keys."""
    grouped = q.reshape(*q.shape[:2], keys.k.shape[1], -1, q.shape[3])
    return QueryBlock(grouped, q_tokens), KVBlock.create(*keys)
