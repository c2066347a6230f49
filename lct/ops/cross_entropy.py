"""Blockwise cross-entropy: the output projection and the loss, a chunk of tokens at a time.

The logits [B, T, V] never exist. The vocabulary may be split over 'tensor' and the sequence over
'sequence'; each device walks its own tokens.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

TOKENS = P(('data', 'fsdp'), 'sequence')
TOKEN_AXES = ('data', 'fsdp', 'sequence')


def cross_entropy(x, head, targets, mask, chunk):
    """mask * -log softmax(x @ head)[targets], per token.

    Args:
      x: [B, T, D] hidden states; head: [D, V]; targets: int32 [B, T]; mask: float32 [B, T].
      chunk: tokens per device whose logits exist at one time.
    Returns:
      float32 [B, T].
    """
    if jax.sharding.get_abstract_mesh().empty:
        return _local(x, head, targets, mask, chunk, axis_name=None)
    head = jax.reshard(head, P(None, 'tensor'))

    def shard(x, head, targets, mask):
        # One cast for the whole shard: its transpose sums the gradient of head over devices once.
        head = lax.pcast(head, TOKEN_AXES, to='varying')
        return _local(x, head, targets, mask, chunk, axis_name='tensor')

    return jax.shard_map(
        shard, in_specs=(P(('data', 'fsdp'), 'sequence', None), P(None, 'tensor'), TOKENS, TOKENS),
        out_specs=TOKENS,
    )(x, head, targets, mask)


def _local(x, head, targets, mask, chunk, axis_name):
    """The loss of one device's tokens, through a scan over chunks of them."""
    batch, length, dim = x.shape
    total = batch * length
    size = min(chunk, total)
    while total % size:  # the largest chunk that divides: shards are powers of two in practice
        size -= 1
    cut = lambda a: a.reshape(total // size, size, *a.shape[2:])
    chunk_loss = functools.partial(_chunk_loss, axis_name=axis_name)

    def step(_, piece):
        return None, jax.checkpoint(chunk_loss)(*piece[:1], head, *piece[1:])

    _, losses = lax.scan(step, None, (cut(x), cut(targets), cut(mask)))
    return losses.reshape(batch, length)


def _chunk_loss(x, head, targets, mask, axis_name):
    """x [C, D], head [D, local V] -> [C]."""
    precision = 'highest' if x.dtype == jnp.float32 else None
    logits = jnp.einsum(
        'CD,DV->CV', x, head.astype(x.dtype), precision=precision, preferred_element_type=jnp.float32
    )
    first = 0 if axis_name is None else lax.axis_index(axis_name) * head.shape[1]
    top = lax.stop_gradient(logits.max(-1))
    words = first + jnp.arange(head.shape[1], dtype=targets.dtype)
    picked = jnp.where(words == targets[:, None], logits, 0.0).sum(-1)
    if axis_name is not None:
        top = lax.pmax(top, axis_name)
        picked = lax.psum(picked, axis_name)
    total = jnp.exp(logits - top[:, None]).sum(-1)
    if axis_name is not None:
        total = lax.psum(total, axis_name)
    return mask * (jnp.log(total) + top - picked)
