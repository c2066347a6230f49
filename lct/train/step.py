"""One optimizer step; the loss is normalised once, over all target tokens of the global batch."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from lct.models import llama, lora, offload
from lct.train import spikes
from lct.train.state import TrainState

Trainable = llama.Params | lora.Trained


def loss_and_grads(
    params: Trainable, config: llama.LlamaConfig, batch: dict[str, jax.Array], tables: Any,
    memory: llama.Memory, frozen: Any = None,
) -> tuple[jax.Array, Trainable]:
    """Mean loss per target token and its gradient, over all micro-batches together.

    params: llama.Params, or lora.Trained with the frozen weights. batch: arrays [A, B, T], A the gradient
    accumulation. The sum of the losses is divided by the sum of loss_mask over the whole batch: a mean of
    means would weigh a token by the length of its micro-batch.

    Returns:
      loss (float32 scalar), grads where the weights are, on the host or the device: in float32 if those of
      several micro-batches were added up, otherwise in the dtype of the weights.
    """
    total = batch['loss_mask'].sum()
    total = jnp.where(total == 0, 1.0, total)  # no target at all: a loss of 0

    def micro_loss(params, micro):
        if frozen is None:
            return llama.loss_sum(params, config, micro, tables, memory) / total
        return lora.loss_sum(params, frozen, config, micro, tables, memory) / total

    def accumulate(carry, micro):
        loss, grads = carry
        more_loss, more_grads = jax.value_and_grad(micro_loss)(params, micro)
        return (loss + more_loss, add(grads, more_grads)), None

    def add(grads, more_grads):
        adding = functools.partial(jax.tree.map, lambda a, b: a + b.astype(jnp.float32))
        return offload.by_layer(adding, grads, more_grads)

    def zeros(p):
        return offload.store_like(p, jnp.zeros_like(offload.fetch(p), jnp.float32))

    if batch['tokens'].shape[0] == 1:
        return jax.value_and_grad(micro_loss)(params, jax.tree.map(lambda x: x[0], batch))
    start = jnp.zeros((), jnp.float32), jax.tree.map(zeros, params)
    (loss, grads), _ = lax.scan(accumulate, start, batch)
    return loss, grads


def _norm(grads):
    """The norm of all gradients together, float32."""
    return jnp.sqrt(offload.sum_by_layer(lambda part: optax.tree.norm(_float32(part), squared=True), grads))


def _update(trained, grads, tx, grad_norm, rate, accepted):
    """(params, opt_state) after a step, or the old ones if it is not accepted."""
    params, opt_state = trained
    updates, opt_state = tx.update(_float32(grads), opt_state, params, grad_norm=grad_norm)
    updates = jax.tree.map(lambda update: -rate.astype(update.dtype) * update, updates)
    new = optax.apply_updates(params, updates), opt_state
    return jax.tree.map(lambda new, old: jnp.where(accepted, new, old), new, trained)


def _float32(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


@functools.partial(jax.jit, static_argnames=('config', 'memory', 'tx', 'schedule'), donate_argnames='state')
def train_step(
    state: TrainState, batch: dict[str, jax.Array], tables: Any, config: llama.LlamaConfig,
    memory: llama.Memory, tx: optax.GradientTransformation, schedule: optax.Schedule,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """state, batch -> state, metrics. tx and schedule: optimizer.make and optimizer.schedule.

    A bad step changes nothing but the counters: `where` selects the old state, so that no NaN can reach the
    optimizer's moments. A step is bad if its loss or gradient is not finite, if state.guard takes it for a
    spike, or if its batch has no target: decay and momentum alone would move the weights.

    metrics: scalars; targets is the sum of the batch's loss_mask, spike (only with a guard) is 0 or 1.
    """
    loss, grads = loss_and_grads(state.params, config, batch, tables, memory, state.frozen)
    with jax.named_scope('optimizer'):
        grad_norm, targets = _norm(grads), batch['loss_mask'].sum()
        accepted, guard = jnp.isfinite(loss) & jnp.isfinite(grad_norm), state.guard
        if guard is not None:
            spike = accepted & spikes.is_spike(guard, grad_norm)
            accepted &= ~spike
        skipped = 1 - accepted.astype(jnp.int32)
        empty = targets == 0
        accepted &= ~empty
        if guard is not None:
            guard = spikes.accept(guard, grad_norm, accepted)
        rate = jnp.asarray(schedule(state.step), jnp.float32)
        update = functools.partial(_update, tx=tx, grad_norm=grad_norm, rate=rate, accepted=accepted)
        params, opt_state = offload.by_layer(update, (state.params, state.opt_state), grads)
        state = state.replace(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            skipped=jnp.where(empty, state.skipped, state.skipped + skipped),
            skipped_in_row=jnp.where(empty, state.skipped_in_row, (state.skipped_in_row + skipped) * skipped),
            guard=guard,
        )
    metrics = {
        'loss': loss, 'grad_norm': grad_norm, 'learning_rate': rate, 'skipped': state.skipped,
        'skipped_in_row': state.skipped_in_row, 'targets': targets,
    }
    if guard is not None:
        metrics['spike'] = spike.astype(jnp.int32)
    return state, metrics
