"""A guard against spikes: steps whose gradient norm is far above that of the steps before them.

The history holds the norms of accepted steps alone, and its level is the median, so neither a NaN nor a row
of spikes can move the threshold. Guards that learn from rejected steps reject good steps afterwards, or let
NaN into the weights.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from lct import sharding

MIN_SHARE = 4  # the guard rejects nothing before a quarter of its window is filled


class SpikeGuard(struct.PyTreeNode):
    """norms: float32 [W], gradient norms of the last accepted steps, oldest first; NaN before there are W.

    factor: a step is a spike if its norm is above factor times the median of norms.
    """

    norms: Any
    factor: float = struct.field(pytree_node=False)


def create(factor: float, window: int, norms: Sequence[float] = ()) -> SpikeGuard:
    """A guard on the current mesh with a history of norms, of which the last `window` count."""
    known = jnp.asarray(norms, jnp.float32)[-window:]
    padded = jnp.full(window, jnp.nan).at[window - len(known):].set(known)
    return SpikeGuard(sharding.put(padded, jax.sharding.PartitionSpec()), factor)


def is_spike(guard: SpikeGuard, grad_norm: jax.Array) -> jax.Array:
    """bool []: whether a gradient norm (float32 []) is a spike."""
    known = jnp.isfinite(guard.norms).sum()
    enough = known >= max(len(guard.norms) // MIN_SHARE, 1)
    level = jnp.nanmedian(guard.norms)
    return enough & (level > 0) & (grad_norm > guard.factor * level)


def accept(guard: SpikeGuard, grad_norm: jax.Array, accepted: jax.Array) -> SpikeGuard:
    """The guard after a step; accepted: bool [], whether the step counts."""
    moved = jnp.append(guard.norms[1:], grad_norm.astype(jnp.float32))
    return guard.replace(norms=jnp.where(accepted, moved, guard.norms))


def history(guard: SpikeGuard | None) -> list[float]:
    """The known norms, oldest first, for the record of a checkpoint; create() takes them back."""
    if guard is None:
        return []
    return [norm for norm in jax.device_get(guard.norms).tolist() if not math.isnan(norm)]
