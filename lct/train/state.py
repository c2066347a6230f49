"""What training carries from step to step."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from lct import sharding
from lct.models import llama, lora


class TrainState(struct.PyTreeNode):
    """step: the place in the schedule; every batch moves it on by one, and a stage that ends early to its
    end. params: what is trained, llama.Params or lora.Trained. skipped: batches whose gradient was not
    finite, in all and
    in a row. frozen: the weights that no step changes; they are the base model's, so no checkpoint holds
    them."""

    step: Any
    params: Any
    opt_state: Any
    skipped: Any
    skipped_in_row: Any
    frozen: Any = None


def scalar(value):
    """An int32 counter on every device."""
    return sharding.put(jnp.asarray(value, jnp.int32), jax.sharding.PartitionSpec())


def create(params, tx, config=None, adapter=None):
    """A fresh TrainState around params; the optimizer's moments inherit the shardings of what is trained.

    adapter: lora.Adapter if most of params is to stand still; it needs the config of params.
    """
    frozen = None
    if adapter:
        whole, frozen = lora.freeze(params, adapter)
        params = lora.Trained(lora.init(config, adapter, params.final_norm.dtype), whole)
    # no two counters share a buffer, because all are donated
    return TrainState(scalar(0), params, fresh_moments(params, tx), scalar(0), scalar(0), frozen)


def fresh_moments(params, tx):
    """The optimizer's state before its first step."""
    return jax.jit(tx.init)(params)


def model(state):
    """The llama.Params to evaluate and to export, adapters merged."""
    return state.params if state.frozen is None else lora.merge(state.params, state.frozen)


def abstract(config, tx, dtype, adapter=None):
    """TrainState of ShapeDtypeStructs placed on the current mesh: the target of a restore."""
    mesh = jax.sharding.get_mesh()
    params, frozen = lora.abstract(config, adapter, dtype) if adapter else (llama.abstract(config, dtype), None)

    def blank(params, frozen):
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, params, tx.init(params), zero, zero, frozen)

    def placed(x):
        if mesh.empty:
            return x
        spec = jax.sharding.PartitionSpec() if x.sharding is None else x.sharding.spec
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, spec))

    return jax.tree.map(placed, jax.eval_shape(blank, params, frozen))


def move(tree, target):
    """Place every array of tree as target says: how a state changes mesh between stages."""
    return jax.tree.map(lambda x, to: jax.device_put(x, to.sharding) if to.sharding else x, tree, target)
