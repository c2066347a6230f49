"""A train step that compiles nothing, for tests of the code around it."""

import jax.numpy as jnp


def train_step(state, batch, tables, config, memory, tx, schedule):
    """Stands in for lct.train.step.train_step: weights that depend on the batches and their order."""
    mark = (batch['tokens'].sum() % 97) / 97.0
    moments = state.opt_state[1]
    moments = moments._replace(mu=moments.mu.replace(final_norm=moments.mu.final_norm + 1.0))
    state = state.replace(
        step=state.step + 1, params=state.params.replace(final_norm=1.5 * state.params.final_norm + mark),
        opt_state=(state.opt_state[0], moments, *state.opt_state[2:]))
    bad = jnp.isnan(batch['loss_mask']).any().astype(jnp.int32)
    state = state.replace(skipped=state.skipped + bad, skipped_in_row=(state.skipped_in_row + bad) * bad)
    return state, {'loss': jnp.where(bad, jnp.nan, mark), 'grad_norm': mark,
                   'learning_rate': jnp.asarray(schedule(state.step)), 'skipped': state.skipped,
                   'skipped_in_row': state.skipped_in_row, 'targets': batch['loss_mask'].sum()}
