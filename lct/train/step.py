"""One optimizer step; the loss is normalised once, over all target tokens of the global batch."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from lct.models import llama, lora
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
      loss (float32 scalar), grads in float32.
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
        grads = jax.tree.map(lambda a, b: a + b.astype(jnp.float32), grads, more_grads)
        return (loss + more_loss, grads), None

    if batch['tokens'].shape[0] == 1:
        loss, grads = jax.value_and_grad(micro_loss)(params, jax.tree.map(lambda x: x[0], batch))
        return loss, jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    start = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params)
    (loss, grads), _ = lax.scan(accumulate, (jnp.zeros((), jnp.float32), start), batch)
    return loss, grads


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
        grad_norm, targets = optax.tree.norm(grads), batch['loss_mask'].sum()
        accepted, guard = jnp.isfinite(loss) & jnp.isfinite(grad_norm), state.guard
        if guard is not None:
            spike = accepted & spikes.is_spike(guard, grad_norm)
            accepted &= ~spike
        skipped = 1 - accepted.astype(jnp.int32)
        empty = targets == 0
        accepted &= ~empty
        if guard is not None:
            guard = spikes.accept(guard, grad_norm, accepted)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        rate = jnp.asarray(schedule(state.step), jnp.float32)
        updates = jax.tree.map(lambda update: -rate.astype(update.dtype) * update, updates)
        params = optax.apply_updates(state.params, updates)
        keep = functools.partial(jax.tree.map, lambda new, old: jnp.where(accepted, new, old))
        state = state.replace(
            step=state.step + 1,
            params=keep(params, state.params),
            opt_state=keep(opt_state, state.opt_state),
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
