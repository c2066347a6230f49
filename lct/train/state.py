"""The training state: weights, optimizer moments and counters."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from lct import sharding
from lct.models import llama, lora


class TrainState(struct.PyTreeNode):
    """The state of a run between two steps.

    step: position in the schedule. Every batch advances it by one; a gate that opens early ends the stage.
    params: the trained weights, llama.Params or lora.Trained.
    skipped, skipped_in_row: batches whose gradient was not finite or a spike, in total and in a row.
    frozen: the base model's weights that no step changes; no checkpoint stores them.
    guard: spikes.SpikeGuard, or None; the record of a checkpoint holds its norms, not the arrays.
    """

    step: Any
    params: Any
    opt_state: Any
    skipped: Any
    skipped_in_row: Any
    frozen: Any = None
    guard: Any = None


def scalar(value: int) -> jax.Array:
    """An int32 counter on every device."""
    return sharding.put(jnp.asarray(value, jnp.int32), jax.sharding.PartitionSpec())


def create(params: llama.Params, tx: optax.GradientTransformation, config: llama.LlamaConfig | None = None,
           adapter: lora.Adapter | None = None) -> TrainState:
    """A fresh TrainState around params; the optimizer's moments inherit the shardings of what is trained.

    adapter: to train in place of params, which are frozen; it needs the config of params.
    """
    frozen = None
    if adapter:
        trained, frozen = lora.freeze(params, adapter)
        params = lora.Trained(lora.init(config, adapter, params.final_norm.dtype), trained)
    # no two counters share a buffer, because all are donated
    return TrainState(scalar(0), params, fresh_moments(params, tx), scalar(0), scalar(0), frozen)


def fresh_moments(params: Any, tx: optax.GradientTransformation) -> optax.OptState:
    """The optimizer's state before its first step."""
    return jax.jit(tx.init)(params)


def model(state: TrainState) -> llama.Params:
    """The llama.Params to evaluate and to export, adapters merged."""
    return state.params if state.frozen is None else lora.merge(state.params, state.frozen)


def abstract(config: llama.LlamaConfig, tx: optax.GradientTransformation, dtype: jnp.dtype,
             adapter: lora.Adapter | None = None) -> TrainState:
    """TrainState of ShapeDtypeStructs placed on the current mesh: the target of a restore."""
    mesh = jax.sharding.get_mesh()
    params, frozen = llama.abstract(config, dtype), None
    if adapter:
        params, frozen = lora.abstract(config, adapter, dtype)

    def blank(params, frozen):
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, params, tx.init(params), zero, zero, frozen)

    def placed(x):
        if mesh.empty:
            return x
        spec = jax.sharding.PartitionSpec() if x.sharding is None else x.sharding.spec
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, spec))

    return jax.tree.map(placed, jax.eval_shape(blank, params, frozen))


def move(tree: Any, target: Any) -> Any:
    """Place every array of tree as target (abstract) says: how a state changes mesh between stages."""
    return jax.tree.map(lambda x, to: jax.device_put(x, to.sharding) if to.sharding else x, tree, target)
