"""What every way to split a sequence shares: who sees, what is seen, and the one custom_vjp.

A strategy is two functions over the local shard of each device, forward and backward, built on the inner block
(blockwise_attention) and collectives. Only q, k, v, out and lse are kept between them; the backward starts from
the global lse, never from the derivative of a merge.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from lct.ops import blockwise_attention
from lct.ops.blockwise_attention import Chunks, fit, nothing, zero_grads
from lct.ops.kernels import triton_attention

# the inner block by name: plain XLA, the reference, or fused for GPUs
KERNELS = {'xla': blockwise_attention, 'triton': triton_attention}


class Queries(NamedTuple):
    q: Any  # [B, T, K, G, H]: heads by the key/value head that they share, as the inner block reads them
    positions: Any  # [B, T] int32
    segments: Any  # [B, T] int32


class Keys(NamedTuple):
    """What travels: a block of keys and values with all that the mask needs."""

    k: Any  # [B, K, S, H]: heads first, as the inner block reads them
    v: Any  # [B, K, S, H]
    tokens: Any  # [B, 2, S] int32, positions and segments: one transfer instead of two

    @classmethod
    def of(cls, k, v, positions, segments):
        """From k, v [B, S, K, H]; positions, segments [B, S]."""
        tokens = jnp.stack([positions, segments], 1)
        # to shard_map k may vary over more mesh axes than tokens; what waits together must vary alike
        tokens += lax.full_like(k, 0, tokens.dtype, shape=tokens.shape)
        return cls(k.swapaxes(1, 2), v.swapaxes(1, 2), tokens)


class Cotangent(NamedTuple):
    dout: Any  # [B, T, K, G, H]
    lse: Any  # [B, T, K, G], over all keys
    delta: Any  # [B, T, K, G], rowsum(dout * out)


@dataclasses.dataclass(frozen=True)
class Split:
    """How one call is split: the mesh axis (None on one device), neighbours of it that share a node, tiles,
    the sliding window and the inner block."""

    axis_name: Any
    node_size: int
    chunks: Chunks
    window: int | None
    kernel: str

    @property
    def size(self):
        return 1 if self.axis_name is None else lax.axis_size(self.axis_name)

    @property
    def num_nodes(self):
        return self.size // self.node_size

    def to_next(self, x):
        """Every device's x to the next device of the axis, the last one's to the first."""
        return self._send(x, lambda i: (i + 1) % self.size)

    def to_next_in_node(self, x):
        n = self.node_size
        return self._send(x, lambda i: i // n * n + (i + 1) % n)

    def to_next_node(self, x):
        return self._send(x, lambda i: (i + self.node_size) % self.size)

    def _send(self, x, where):
        pairs = [(i, where(i)) for i in range(self.size)]
        return jax.tree.map(lambda leaf: lax.ppermute(leaf, self.axis_name, pairs), x)

    @property
    def nodes(self):
        """Device numbers of every node, for collectives inside nodes."""
        return [list(range(i, i + self.node_size)) for i in range(0, self.size, self.node_size)]


def see(total, queries, keys, how):
    """(out, lse) after one more block of keys: attend of the inner block."""
    return KERNELS[how.kernel].attend(
        total, queries.q, keys.k, keys.v, queries.positions, keys.tokens[:, 0], queries.segments, keys.tokens[:, 1],
        how.chunks, how.window)


def see_grad(grads, queries, keys, cotangent, how):
    """(dq, dk, dv) after one more block of keys: attend_grad of the inner block."""
    return KERNELS[how.kernel].attend_grad(
        grads, queries.q, keys.k, keys.v, *cotangent, queries.positions, keys.tokens[:, 0], queries.segments,
        keys.tokens[:, 1], how.chunks, how.window)


def zero_dq(queries, how):
    """The dq that see_grad begins with, in the inner block's own layout."""
    return KERNELS[how.kernel].zero_dq(queries.q)


def finished_dq(dq, queries, how):
    """dq [B, T, K, G, H] after all blocks."""
    return KERNELS[how.kernel].finished_dq(dq, queries.q)


def split_attention(forward, backward):
    """The attention of a strategy.

    Args:
      forward(queries, keys, how) -> (out, lse) in float32.
      backward(queries, keys, cotangent, how) -> (dq [B, T, K, G, H], dk, dv [B, K, S, H]) in float32.
    Returns:
      a differentiable function (q, k, v, positions, segment_ids, how) -> out [B, T, N, H] in q's dtype. Named
      'attention' for remat policies: q, k, v, out, lse, all that its backward needs.
    """
    @functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
    def attention(q, k, v, positions, segment_ids, how):
        return save(q, k, v, positions, segment_ids, how)[0]

    def save(q, k, v, positions, segment_ids, how):
        q, k, v = checkpoint_name((q, k, v), 'attention')
        out, lse = forward(Queries(q, positions, segment_ids), Keys.of(k, v, positions, segment_ids), how)
        out, lse = checkpoint_name((out.astype(q.dtype), lse), 'attention')
        return out, (q, k, v, positions, segment_ids, out, lse)

    def gradients(how, saved, dout):
        q, k, v, positions, segment_ids, out, lse = saved
        delta = jnp.sum(dout.astype(lse.dtype) * out.astype(lse.dtype), -1)
        # Plus a zero that is known only now. XLA:CPU drops barriers before it schedules, and would lay out the keys of
        # the backward during the forward, in memory beside that of the forward.
        k, v = (x + (0 * delta.reshape(-1)[0]).astype(x.dtype) for x in (k, v))
        dq, dk, dv = backward(Queries(q, positions, segment_ids), Keys.of(k, v, positions, segment_ids),
                              Cotangent(dout, lse, delta), how)
        dk, dv = dk.swapaxes(1, 2), dv.swapaxes(1, 2)
        return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None

    attention.defvjp(save, gradients)

    def call(q, k, v, positions, segment_ids, how):
        if q.shape[2] % k.shape[2]:
            raise ValueError(f'num_heads {q.shape[2]} is not a multiple of num_kv_heads {k.shape[2]}')
        # fitted to the shard before shards are joined, so that no chunk straddles two of them
        grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
        chunks = Chunks(fit(how.chunks.queries(grouped.shape[3]), q.shape[1]), fit(how.chunks.key, q.shape[1]))
        how = dataclasses.replace(how, chunks=chunks)
        return attention(grouped, k, v, positions, segment_ids, how).reshape(q.shape)

    return call


__all__ = ['KERNELS', 'Cotangent', 'Keys', 'Queries', 'Split', 'finished_dq', 'nothing', 'see', 'see_grad',
           'split_attention', 'zero_dq', 'zero_grads']
