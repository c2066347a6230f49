"""Blockwise cross-entropy: the output projection and the loss, a chunk of tokens at a time.

The logits [B, T, V] never exist. The vocabulary may be sharded over 'tensor' and the sequence over
'sequence'; each device scans its own tokens. The loss is the root of the graph: its gradient is known up
to one scalar as soon as the logits are, so the training form computes it in the same pass, with three
matmuls by the head where a recomputing backward needs four.

Letters: B batch, T sequence, D embed_dim, V vocab, C tokens of a chunk.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P


class Axes(NamedTuple):
    """Mesh axes by what they shard; () without a mesh."""

    tokens: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()  # D of the stored head
    copies: tuple[str, ...] = ()  # nothing: the head is replicated over them
    vocab: tuple[str, ...] = ()


MESH = Axes(('data', 'fsdp', 'sequence'), ('fsdp', 'sequence'), ('data',), ('tensor',))
X = P(('data', 'fsdp'), 'sequence', None)
TOKENS = P(('data', 'fsdp'), 'sequence')
HEAD = P(MESH.rows, 'tensor')


def cross_entropy(
    x: jax.Array, head: jax.Array, targets: jax.Array, mask: jax.Array, chunk: int
) -> jax.Array:
    """mask * -log softmax(x @ head)[targets], per token, for evaluation.

    Args:
      x: [B, T, D] hidden states; head: [D, V]; targets: int32 [B, T]; mask: float32 [B, T].
      chunk: tokens per device whose logits exist at one time.
    Returns:
      float32 [B, T].
    """
    return _over_mesh(_losses, TOKENS, chunk, x, _stored(head), targets, mask)


def cross_entropy_sum(
    x: jax.Array, head: jax.Array, targets: jax.Array, mask: jax.Array, chunk: int
) -> jax.Array:
    """The sum of cross_entropy over the whole mesh, float32 [], for training.

    Under differentiation the gradients of x and head are computed with the loss, summed in float32 and stored
    in their own dtypes; the backward only scales them. mask is a constant: its gradient is zero. Without
    differentiation this is cross_entropy(...).sum().
    """
    return _sum(x, _stored(head), targets, mask, chunk)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _sum(x, head, targets, mask, chunk):
    return cross_entropy(x, head, targets, mask, chunk).sum()


def _sum_forward(x, head, targets, mask, chunk):
    loss, *grads = _over_mesh(_loss_and_grads, (P(), X, HEAD), chunk, x, head, targets, mask)
    return loss, grads


def _sum_backward(chunk, grads, scale):
    dx, dhead = ((scale * grad).astype(grad.dtype) for grad in grads)
    return dx, dhead, None, None


_sum.defvjp(_sum_forward, _sum_backward)


def _no_mesh():
    return jax.sharding.get_abstract_mesh().empty


def _stored(head):
    """head with the sharding of the parameter table: no communication if it has that already."""
    return head if _no_mesh() else jax.reshard(head, HEAD)


def _over_mesh(function: Callable, out_specs, chunk, x, head, targets, mask):
    """function on every device's own tokens and vocabulary shard."""
    local = functools.partial(function, chunk=chunk, axes=Axes() if _no_mesh() else MESH)
    if not _no_mesh():
        local = jax.shard_map(local, in_specs=(X, HEAD, TOKENS, TOKENS), out_specs=out_specs)
    with jax.named_scope('cross_entropy'):
        return local(x, head, targets, mask)


def _losses(x, head, targets, mask, chunk, axes):
    """The losses of one device's tokens [B, T]."""
    head = _gather(head, x.dtype, axes)

    def step(_, inputs):
        x, targets, mask = inputs
        return None, mask * _forward(x, head, targets, axes)[0]

    return lax.scan(step, None, _split(chunk, x, targets, mask))[1].reshape(mask.shape)


def _loss_and_grads(x, head, targets, mask, chunk, axes):
    """Sum of the losses of all tokens, dx [B, T, D] of one device's tokens, dhead of its stored shard."""
    full = _gather(head, x.dtype, axes)

    def step(dhead, inputs):
        x, targets, mask = inputs
        losses, logits, lse, one_hot = _forward(x, full, targets, axes)
        dlogits = (mask[:, None] * (jnp.exp(logits - lse[:, None]) - one_hot)).astype(x.dtype)
        dx = lax.psum(_product('CV,DV->CD', dlogits, full), axes.vocab)
        dhead += _product('CD,CV->DV', x, dlogits)
        return dhead, ((mask * losses).sum(), dx.astype(x.dtype))

    start = lax.pcast(jnp.zeros(full.shape, jnp.float32), axes.tokens + axes.vocab, to='varying')
    dhead, (loss, dx) = lax.scan(step, start, _split(chunk, x, targets, mask))
    # One float32 sum over the tokens of all devices, scattered to the shards of the stored head.
    dhead = lax.psum(lax.psum_scatter(dhead, axes.rows, scatter_dimension=0, tiled=True), axes.copies)
    return lax.psum(loss.sum(), axes.tokens), dx.reshape(x.shape), dhead.astype(head.dtype)


def _gather(head, dtype, axes):
    """head [D, local V] in the dtype of x, gathered from the stored shards."""
    return lax.all_gather(head.astype(dtype), axes.rows, axis=0, tiled=True)


def _split(chunk, *arrays):
    """Arrays [B, T, ...] as chunks [n, C, ...]; C is the largest size up to chunk that divides B * T. In
    practice shards are powers of two, and C is chunk."""
    total = arrays[0].shape[0] * arrays[0].shape[1]
    size = next(size for size in range(min(chunk, total), 0, -1) if total % size == 0)
    return [a.reshape(total // size, size, *a.shape[2:]) for a in arrays]


def _forward(x, head, targets, axes):
    """x [C, D], head [D, local V] -> losses [C], logits [C, local V], lse [C], one_hot [C, local V]."""
    logits = _product('CD,DV->CV', x, head)
    vocab_ids = lax.axis_index(axes.vocab) * head.shape[1] + jnp.arange(head.shape[1], dtype=targets.dtype)
    one_hot = vocab_ids == targets[:, None]
    top = lax.pmax(logits.max(-1), axes.vocab)
    total = jnp.exp(logits - top[:, None]).sum(-1)
    target_logit = jnp.where(one_hot, logits, 0.0).sum(-1)
    total, target_logit = lax.psum((total, target_logit), axes.vocab)
    lse = top + jnp.log(total)
    return lse - target_logit, logits, lse, one_hot


def _product(equation, a, b):
    """Matmul accumulated in float32, in full precision for float32 inputs: no TF32 or bfloat16 passes."""
    precision = 'highest' if a.dtype == jnp.float32 else None
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=jnp.float32)
