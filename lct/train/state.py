"""The training state: weights, optimizer moments and counters."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from lct import sharding
from lct.models import llama, lora, offload


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
           adapter: lora.Adapter | None = None, offload_state: str = 'none') -> TrainState:
    """A fresh TrainState around params; the optimizer's moments inherit the shardings of what is trained.

    adapter: to train in place of params, which are frozen; it needs the config of params.
    offload_state: as in models.memory.Memory; it needs a mesh.
    """
    frozen = None
    if adapter:
        trained, frozen = lora.freeze(params, adapter)
        params = lora.Trained(lora.init(config, adapter, params.final_norm.dtype), trained)
    if offload_state == 'all':
        params = jax.tree.map(lambda x: jax.device_put(x, x.sharding.with_memory_kind(offload.HOST)), params)
    # no two counters share a buffer, because all are donated
    state = TrainState(
        scalar(0), params, fresh_moments(params, tx, offload_state), scalar(0), scalar(0), frozen)
    return placed(state, offload_state)


def placed(state: TrainState, offload_state: str) -> TrainState:
    """A TrainState of arrays or ShapeDtypeStructs in the memory that a policy says, also those on the
    device by its name: a step returns them so, and another placement would be another program."""
    if offload_state == 'none':
        return state
    host = {'opt_state'} | ({'params'} if offload_state == 'all' else set())

    def one(path, x):
        kind = offload.HOST if path[0].name in host and x.ndim else offload.DEVICE
        placement = x.sharding.with_memory_kind(kind)
        if not isinstance(x, jax.ShapeDtypeStruct):
            return jax.device_put(x, placement)
        if placement.memory_kind != kind:  # devices that are only compiled for lose it, abstract ones keep it
            placement = jax.NamedSharding(placement.mesh.abstract_mesh, placement.spec, memory_kind=kind)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placement)

    return jax.tree_util.tree_map_with_path(one, state)


def fresh_moments(params: Any, tx: optax.GradientTransformation,
                  offload_state: str = 'none') -> optax.OptState:
    """The optimizer's state before its first step."""
    def init(params):
        moments = tx.init(offload.fetch(params))
        if offload_state == 'none':
            return moments
        return jax.tree.map(lambda x: offload.to_host(x) if x.ndim else x, moments)

    return jax.jit(init)(params)


def model(state: TrainState) -> llama.Params:
    """The llama.Params to evaluate and to export, on the devices, adapters merged."""
    params = jax.tree.map(offload.onto_device, state.params)
    return params if state.frozen is None else lora.merge(params, state.frozen)


def abstract(config: llama.LlamaConfig, tx: optax.GradientTransformation, dtype: jnp.dtype,
             adapter: lora.Adapter | None = None, offload_state: str = 'none') -> TrainState:
    """TrainState of ShapeDtypeStructs placed on the current mesh: the target of a restore."""
    mesh = jax.sharding.get_mesh()
    params, frozen = llama.abstract(config, dtype), None
    if adapter:
        params, frozen = lora.abstract(config, adapter, dtype)

    def blank(params, frozen):
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, params, tx.init(params), zero, zero, frozen)

    def on_mesh(x):
        if mesh.empty:
            return x
        spec = jax.sharding.PartitionSpec() if x.sharding is None else x.sharding.spec
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, spec))

    state = jax.tree.map(on_mesh, jax.eval_shape(blank, params, frozen))
    return placed(state, offload_state)


def move(tree: Any, target: Any) -> Any:
    """Place every array of tree as target (abstract) says: how a state changes mesh between stages."""
    def moved(x, to):
        if not to.sharding or getattr(x, 'sharding', None) == to.sharding:  # numpy arrays have none
            return x
        if offload.is_on_host(x) or offload.is_on_host(to):  # never from one mesh's host to another's
            x = jax.device_put(offload.onto_device(x), to.sharding.with_memory_kind(offload.DEVICE))
        return jax.device_put(x, to.sharding)

    return jax.tree.map(moved, tree, target)
