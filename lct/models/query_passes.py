"""A layer in passes over its queries: the Blockwise Parallel Transformer (Liu & Abbeel 2023, arXiv
2305.19370, section 3), on one device and on a ring.

The keys and values of the shard are computed once. Then one pass after the other takes a share of the tokens
as queries through attention, the output projection and the FFN, and its result replaces them in the residual
stream. The backward runs in the same passes, and its gradients replace the cotangent. So q, out, dq and the
residual stream between attention and FFN exist for one pass at a time; x and its cotangent, k, v, dk and dv
exist for the whole shard. dk, dv and the gradients of the weights are summed over the passes in float32.

Every pass attends to all keys, so a ring sends its blocks once per pass: the communication is that of plain
attention times the number of passes. It still overlaps with compute where a share of a shard is as long as a
shard would have to be (lct.plan.timing.least_block).

Letters as in lct.sharding; P passes, R devices of the sequence axis.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from lct import sharding
from lct.models import causal_attention
from lct.models.causal_attention import Keys
from lct.models.memory import REMAT, Memory
from lct.ops import rope
from lct.ops.blockwise_attention import init_grads
from lct.ops.context_parallel import ATTENTION_OUTPUT
from lct.ops.masks import Tokens
from lct.ops.strategies import Attention


class Parts(NamedTuple):
    """The functions of a layer, as in llama: weights are arguments, all else is constant.

    gather: (layer, dtype) -> layer, for several uses of its weights.
    project: (x [B, T, D], layer, angles, linear=) -> q [B, T, N, H], k and v [B, T, K, H].
    block: (x, layer, angles, attend=, linear=) -> x after the layer, (k, v).
    """

    gather: Callable
    project: Callable
    block: Callable


@dataclasses.dataclass(frozen=True)
class Passes:
    """The settings of all passes.

    count: P. attention_once: whether (out, lse) of all passes are residuals for the backward, by the name
    ATTENTION_OUTPUT; else it runs the forward of attention again. attention, window: as in causal_attention.
    """

    count: int
    attention_once: bool
    attention: Attention
    window: int | None = None


def block(x: jax.Array, layer: Any, *, parts: Parts, angles: tuple, tokens: Tokens, memory: Memory,
          window: int | None, linear: Callable) -> tuple[jax.Array, None]:
    """x [B, T, D] after a layer, in memory.query_passes passes over the queries.

    angles: of rope.angles for tokens [B, T]; T is a multiple of 2 * R * P. linear: as in llama.block; a
    jax.tree_util.Partial if it has weights of its own.
    """
    if layer.rotates is not None:
        angles = rope.angles_if(layer.rotates, angles)
    if not isinstance(linear, jax.tree_util.Partial):
        linear = jax.tree_util.Partial(linear)
    weights = parts.gather(layer, x.dtype).replace(rotates=None), linear
    once = REMAT[memory.remat].attention_once
    passes = Passes(memory.query_passes, once, memory.attention, window)
    return _in_passes(parts, passes, x, weights, angles, tokens), None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _in_passes(parts, passes, x, weights, angles, tokens):
    return _forward(parts, passes, x, weights, angles, tokens)[0]


def _project(parts, x, weights, angles):
    layer, linear = weights
    return parts.project(x, layer, angles, linear=linear)


def _finish(parts, x, out, weights, angles):
    """x after the output projection of out [B, T, N, H] and the FFN; its q, k and v are not used."""
    layer, linear = weights
    return parts.block(x, layer, angles, attend=lambda *_: out, linear=linear)[0]


def _forward(parts, passes, x, weights, angles, tokens):
    cuts, constants = cut(x, passes.count), cut((angles, tokens), passes.count)
    keys = Keys(*_keys(parts, passes, cuts, weights, constants[0]), tokens)

    def one(x, p):
        x_p, (angles_p, tokens_p) = take(x, p), take(constants, p)
        q = _project(parts, x_p, weights, angles_p)[0]
        out, lse = causal_attention.attend(q, tokens_p, keys, passes.attention, passes.window)
        x = put(x, _finish(parts, x_p, out, weights, angles_p), p)
        return x, (out, lse) if passes.attention_once else None

    y, kept = lax.scan(one, cuts, jnp.arange(passes.count))
    kept = checkpoint_name(kept, ATTENTION_OUTPUT)
    return _joined(y), (x, weights, angles, keys, kept)


def _keys(parts, passes, x, weights, angles):
    """Keys and values [B, K, S, H] of all tokens of x and angles, which are cut."""
    def share(p):
        new = _heads_first(_project(parts, take(x, p), weights, take(angles, p))[1:])
        return cut(new, 1, 2)

    shares = lax.map(share, jnp.arange(passes.count))  # [P, B, K, 2 * R, 1, T / (2 * R * P), H]
    return jax.tree.map(lambda x: _joined(jnp.moveaxis(x.squeeze(4), 0, 3), 2), shares)


def _backward(parts, passes, saved, dy):
    x, weights, angles, keys, kept = saved
    cuts, constants = cut(x, passes.count), cut((angles, keys.tokens), passes.count)
    split = passes.attention, passes.window

    def one(carry, p):
        dx, dkv, dweights = carry
        x_p, (angles_p, tokens_p) = take(cuts, p), take(constants, p)
        q, pull_q = jax.vjp(lambda x, w: _project(parts, x, w, angles_p)[0], x_p, weights)
        if kept is None:
            out, lse = causal_attention.attend(q, tokens_p, keys, *split)
        else:
            out, lse = (lax.dynamic_index_in_dim(x, p, 0, keepdims=False) for x in kept)
        _, pull = jax.vjp(lambda x, out, w: _finish(parts, x, out, w, angles_p), x_p, out, weights)
        dx_p, dout, more = pull(take(dx, p))
        dq, *dkv = causal_attention.attend_backward(q, tokens_p, keys, (out, lse, dout), dkv, *split)
        dx_q, more_q = pull_q(dq)
        dweights = _add(_add(dweights, more), more_q)
        return (put(dx, dx_p + dx_q, p), tuple(dkv), dweights), None

    start = cut(dy, passes.count), init_grads(keys.k, keys.v), jax.tree.map(_zero_gradient, weights)
    (dx, dkv, dweights), _ = lax.scan(one, start, jnp.arange(passes.count))
    dkv = cut(dkv, passes.count, 2)

    def of_keys(carry, p):
        dx, dweights = carry
        project = lambda x, w: _heads_first(_project(parts, x, w, take(constants[0], p))[1:])
        new, pull = jax.vjp(project, take(cuts, p), weights)
        dx_p, more = pull(jax.tree.map(lambda d, x: d.astype(x.dtype), take(dkv, p, 2), new))
        return (put(dx, take(dx, p) + dx_p, p), _add(dweights, more)), None

    (dx, dweights), _ = lax.scan(of_keys, (dx, dweights), jnp.arange(passes.count))
    dweights = jax.tree.map(lambda d, w: d.astype(w.dtype), dweights, weights)
    return _joined(dx), dweights, None, None


_in_passes.defvjp(_forward, _backward)


def _heads_first(tree):
    """[B, T, K, H] -> [B, K, T, H]."""
    return jax.tree.map(lambda x: x.swapaxes(1, 2), tree)


def _add(total, more):
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, more)


def _zero_gradient(w):
    """Float32 zeros, sharded as the gradient of w: that of a gathered weight is a partial sum per device."""
    dtype = jnp.promote_types(w.dtype, jnp.float32)
    if sharding.current_mesh() is None:
        return jnp.zeros(w.shape, dtype)
    placed = jax.typeof(w).sharding
    spec = P(*placed.spec.partitions, unreduced=placed.spec.reduced)
    return lax.full(w.shape, 0, dtype, sharding=jax.NamedSharding(placed.mesh, spec))


# ---------------------------------------------------------------------------------------------------
# Shares of the tokens. A zigzag shard is two stretches of the sequence: a share takes a part of each, so that
# every pass is as balanced over the ring as the whole.
# ---------------------------------------------------------------------------------------------------


def cut(tree: Any, count: int, dim: int = 1) -> Any:
    """Arrays [..., T, ...], T at dim, as [..., 2 * R, count, T / (2 * R * count), ...], in place."""
    stretches = 2 * sharding.axis_size('sequence')

    def one(x):
        parts = stretches, count, x.shape[dim] // (stretches * count)
        return _reshape(x, dim, 1, parts)

    return jax.tree.map(one, tree)


def take(tree: Any, p: jax.Array, dim: int = 1) -> Any:
    """Share p of arrays that were cut: [..., T / count, ...]."""
    def one(x):
        x = lax.dynamic_index_in_dim(x, p, dim + 1, keepdims=False)
        return _reshape(x, dim, 2, (x.shape[dim] * x.shape[dim + 1],))

    return jax.tree.map(one, tree)


def put(x: jax.Array, share: jax.Array, p: jax.Array) -> jax.Array:
    """x, cut, with its share p replaced by [B, T / count, ...]."""
    share = _reshape(share, 1, 1, (x.shape[1], 1, x.shape[3]))
    return lax.dynamic_update_slice_in_dim(x, share, p, 2)


def _joined(x, dim=1):
    """The inverse of cut."""
    return _reshape(x, dim, 3, (math.prod(x.shape[dim:dim + 3]),))


def _reshape(x, dim, count, sizes):
    """x with `count` dims from dim on in other sizes; the first of them is the one that the mesh splits."""
    shape = *x.shape[:dim], *sizes, *x.shape[dim + count:]
    if sharding.current_mesh() is None:
        return x.reshape(shape)
    axes = jax.typeof(x).sharding.spec.partitions
    axes = *axes[:dim + 1], *[None] * (len(sizes) - 1), *axes[dim + count:]
    return x.reshape(shape, out_sharding=P(*axes))
