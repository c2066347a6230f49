"""Context parallelism: the common base of all strategies that split a sequence over devices.

A strategy is a forward and a backward function over the local shards, built on an inner block
(blockwise_attention or a kernel) and collectives. make_attention joins the two into one custom_vjp, which
saves only q, k, v, out and lse. The backward starts from the global lse; no merge is differentiated.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from lct.ops.blockwise_attention import Chunks, KVBlock, QueryBlock, Residuals, fit, init_grads
from lct.ops.masks import Tokens

# Inner blocks by name: plain XLA (the reference), fused for CUDA devices, and fused for Hopper.
KERNELS = {'xla': 'lct.ops.blockwise_attention', 'triton': 'lct.ops.kernels.triton_attention',
           'mosaic': 'lct.ops.kernels.mosaic_attention'}
# Names of the residuals of attention, for remat policies: (q, k, v) and (out, lse).
ATTENTION_INPUT, ATTENTION_OUTPUT = 'attention_input', 'attention_output'


@dataclasses.dataclass(frozen=True)
class AttentionOptions:
    """Settings that all strategies share.

    chunks: tile sizes in tokens.
    window: tokens that a query attends to, itself included; None for all before it.
    kernel: the inner block, a key of KERNELS.
    node_size: neighbours on the sequence axis that form one node; unused by a single ring.
    """

    chunks: Chunks = Chunks()
    window: int | None = None
    kernel: str = 'xla'
    node_size: int = 1


@dataclasses.dataclass(frozen=True)
class SequenceAxis:
    """The mesh axis that splits the sequence, in nodes of node_size neighbours; name None is one device."""

    name: str | None
    node_size: int = 1

    @property
    def size(self) -> int:
        """Number of devices."""
        return 1 if self.name is None else lax.axis_size(self.name)

    @property
    def num_nodes(self) -> int:
        """Number of nodes, size / node_size."""
        return self.size // self.node_size

    @property
    def nodes(self) -> list[list[int]]:
        """Device numbers of every node, for collectives within nodes."""
        return [list(range(i, i + self.node_size)) for i in range(0, self.size, self.node_size)]

    def rotate(self, tree: Any) -> Any:
        """Send every device's arrays to the next device of the axis, the last one's to the first."""
        return self._send(tree, lambda i: (i + 1) % self.size)

    def rotate_within_node(self, tree: Any) -> Any:
        """Send every device's arrays to the next device of its node, the last one's to the first."""
        n = self.node_size
        return self._send(tree, lambda i: i // n * n + (i + 1) % n)

    def rotate_nodes(self, tree: Any) -> Any:
        """Send every device's arrays to its counterpart in the next node."""
        return self._send(tree, lambda i: (i + self.node_size) % self.size)

    def _send(self, tree, destination):
        pairs = [(i, destination(i)) for i in range(self.size)]
        return jax.tree.map(lambda leaf: lax.ppermute(leaf, self.name, pairs), tree)


def inner_block(kernel: str) -> ModuleType:
    """The module of an inner block, imported late: compilers for GPUs take their time."""
    return importlib.import_module(KERNELS[kernel])


def attend(
    accumulator: tuple[jax.Array, jax.Array], queries: QueryBlock, block: KVBlock, options: AttentionOptions
) -> tuple[jax.Array, jax.Array]:
    """(out [B, T, K, G, H], lse [B, T, K, G]) after one more block, by attend of the inner block."""
    return inner_block(options.kernel).attend(accumulator, queries, block, options.chunks, options.window)


def attend_backward(
    grads: tuple[jax.Array, jax.Array, jax.Array], queries: QueryBlock, block: KVBlock, residuals: Residuals,
    options: AttentionOptions,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(dq, dk, dv) after one more block, by attend_backward of the inner block; dk, dv: [B, K, S, H]."""
    kernel = inner_block(options.kernel)
    return kernel.attend_backward(grads, queries, block, residuals, options.chunks, options.window)


def init_dq(queries: QueryBlock, options: AttentionOptions) -> jax.Array:
    """Initial dq of attend_backward, in the inner block's own layout."""
    return inner_block(options.kernel).init_dq(queries.q)


def finalize_dq(dq: jax.Array, queries: QueryBlock, options: AttentionOptions) -> jax.Array:
    """dq [B, T, K, G, H] after the last block."""
    return inner_block(options.kernel).finalize_dq(dq, queries.q)


class Directions(NamedTuple):
    """The forward and the backward of a strategy over local shards; all results are float32.

    The queries may be a part of the shard, as in passes over them; the block is always all of it.
    forward: (queries, block, axis, options) -> (out [B, T, K, G, H], lse [B, T, K, G]).
    backward: (queries, block, residuals, grads, axis, options) -> (dq [B, T, K, G, H], dk and dv
      [B, K, S, H]), of which dk and dv continue the sums grads.
    """

    forward: Callable
    backward: Callable


def fit_chunks(options: AttentionOptions, q: jax.Array, length: int) -> AttentionOptions:
    """The options with chunks that divide a shard of queries q [B, T, K, G, H] and one of length keys. They
    are fitted before shards are gathered, so that no chunk straddles two of them."""
    chunks = options.chunks
    chunks = Chunks(fit(chunks.queries(q.shape[3]), q.shape[1]), fit(chunks.key, length))
    return dataclasses.replace(options, chunks=chunks)


def make_attention(name: str, forward: Callable, backward: Callable) -> Callable[..., jax.Array]:
    """The differentiable attention of a strategy, whose queries and keys are the same tokens.

    Args:
      name: label of both passes in a profile.
      forward, backward: as in Directions.
    Returns:
      A function (q, k, v, positions, segment_ids, axis_name, options) -> out [B, T, N, H] in q's dtype. The
      residuals of its backward have names for remat policies: q, k and v ATTENTION_INPUT, out and lse
      ATTENTION_OUTPUT.
    """
    @functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
    def attention(q, k, v, tokens, axis, options):
        return save(q, k, v, tokens, axis, options)[0]

    def save(q, k, v, tokens, axis, options):
        q, k, v = checkpoint_name((q, k, v), ATTENTION_INPUT)
        with jax.named_scope(name):
            out, lse = forward(QueryBlock(q, tokens), _kv_block(k, v, tokens), axis, options)
        out, lse = checkpoint_name((out.astype(q.dtype), lse), ATTENTION_OUTPUT)
        return out, (q, k, v, tokens, out, lse)

    def gradients(axis, options, saved, dout):
        q, k, v, tokens, out, lse = saved
        with jax.named_scope(name):
            delta = jnp.sum(dout.astype(lse.dtype) * out.astype(lse.dtype), -1)
            # Add a zero that is known only now. XLA:CPU drops barriers before it schedules, and would
            # transpose the keys of the backward during the forward, in memory beside the forward's own.
            k, v = (x + (0 * delta.reshape(-1)[0]).astype(x.dtype) for x in (k, v))
            residuals = Residuals(dout, lse, delta)
            block = _kv_block(k, v, tokens)
            grads = init_grads(block.k, block.v)
            dq, dk, dv = backward(QueryBlock(q, tokens), block, residuals, grads, axis, options)
            dk, dv = dk.swapaxes(1, 2), dv.swapaxes(1, 2)
        return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None

    attention.defvjp(save, gradients)

    def call(q, k, v, positions, segment_ids, axis_name, options):
        if q.shape[2] % k.shape[2]:
            raise ValueError(f'num_heads {q.shape[2]} is not a multiple of num_kv_heads {k.shape[2]}')
        grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
        options, axis = fit_chunks(options, grouped, q.shape[1]), SequenceAxis(axis_name, options.node_size)
        return attention(grouped, k, v, Tokens(positions, segment_ids), axis, options).reshape(q.shape)

    return call


def _kv_block(k, v, tokens):
    """KVBlock of k, v [B, S, K, H] and tokens [B, S]."""
    return KVBlock.create(k.swapaxes(1, 2), v.swapaxes(1, 2), tokens)
