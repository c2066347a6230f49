"""What training carries from step to step."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from lct import sharding
from lct.models import llama


class TrainState(struct.PyTreeNode):
    """step counts every batch seen, skipped those whose gradient was not finite (in all, and in a row)."""

    step: Any
    params: Any
    opt_state: Any
    skipped: Any
    skipped_in_row: Any


def create(params, tx):
    """A fresh TrainState around params; the optimizer's moments inherit the shardings of params."""
    zero = lambda: sharding.put(jnp.zeros((), jnp.int32), jax.sharding.PartitionSpec())
    return TrainState(zero(), params, jax.jit(tx.init)(params), zero(), zero())  # donated: no shared buffers


def abstract(config, tx, dtype):
    """TrainState of ShapeDtypeStructs placed on the current mesh: the target of a restore."""
    mesh = jax.sharding.get_mesh()

    def blank(params):
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, params, tx.init(params), zero, zero)

    def placed(x):
        if mesh.empty:
            return x
        spec = jax.sharding.PartitionSpec() if x.sharding is None else x.sharding.spec
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, spec))

    return jax.tree.map(placed, jax.eval_shape(blank, llama.abstract(config, dtype)))


def move(tree, target):
    """Place every array of tree as target says: how a state changes mesh between stages."""
    return jax.tree.map(lambda x, to: jax.device_put(x, to.sharding) if to.sharding else x, tree, target)
