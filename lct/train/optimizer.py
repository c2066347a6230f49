"""AdamW (Loshchilov & Hutter 2019) through optax, with one learning-rate schedule over all stages."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lct.train.stages import Stage


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW; the defaults are EasyContext's. The learning rate belongs to the stage."""

    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0

    def __post_init__(self):
        for field, holds, constraint in (
            ('b1', 0 <= self.b1 < 1, 'at least 0 and below 1, such as 0.9'),
            ('b2', 0 <= self.b2 < 1, 'at least 0 and below 1, such as 0.95'),
            ('eps', 0 < self.eps < math.inf, 'a positive number, such as 1e-8'),
            ('weight_decay', 0 <= self.weight_decay < math.inf, '0 or a positive number, such as 0.1'),
            ('clip_norm', self.clip_norm > 0, 'positive, such as 1.0'),
        ):
            if not holds:
                raise ValueError(f'optimizer {field} {getattr(self, field)} must be {constraint}')


def stage_schedule(learning_rate: float, num_steps: int, warmup_steps: int,
                   final_fraction: float) -> optax.Schedule:
    """Linear warm-up to learning_rate, then a cosine to final_fraction of it (1.0: constant)."""
    first = learning_rate / max(warmup_steps, 1)
    warmup = optax.linear_schedule(first, learning_rate, max(warmup_steps - 1, 1))
    decay = optax.cosine_decay_schedule(learning_rate, max(num_steps - warmup_steps, 1), final_fraction)
    return optax.join_schedules([warmup, decay], [warmup_steps])


def schedule(stages: Sequence[Stage]) -> optax.Schedule:
    """The learning rate by step of the run: the stages' schedules one after the other."""
    return _joined(tuple((s.learning_rate, s.num_steps, s.warmup_steps, s.final_fraction) for s in stages))


@functools.cache  # a jitted step is compiled again for every new schedule object: equal ones must be the same
def _joined(rows):
    schedules = [stage_schedule(*row) for row in rows]
    ends, total = [], 0
    for _, num_steps, *_ in rows[:-1]:
        total += num_steps
        ends.append(total)
    return optax.join_schedules(schedules, ends)


@functools.cache
def make(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW up to its learning rate; norms and biases are not decayed.

    The step multiplies by -schedule(state.step) itself: optax.adamw would look the rate up by a counter of
    its own, which stands still whenever a non-finite step is skipped and so falls behind the stages.
    The moments are float32 from the start, whatever the parameters are, as the gradients are: optax would
    begin with the parameters' dtype and go on with the gradients'.
    update takes the norm of all gradients as grad_norm, so that it can be given one layer at a time.
    """
    chain = optax.chain(
        clip_by_norm(config.clip_norm),
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
    )
    return optax.GradientTransformation(
        lambda params: chain.init(jax.tree.map(lambda p: p.astype(jnp.float32), params)), chain.update)


def clip_by_norm(max_norm: float) -> optax.GradientTransformationExtraArgs:
    """optax.clip_by_global_norm with the norm as an argument of update."""
    def update(updates, state, params=None, *, grad_norm, **_):
        clip = lambda g: jax.lax.select(grad_norm < max_norm, g, g / grad_norm.astype(g.dtype) * max_norm)
        return jax.tree.map(clip, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def decayed(params: Any) -> Any:
    """A tree like params: True for matrices, False for the weights of norms and for biases."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not str(path[-1].name).endswith(('norm', 'bias')), params
    )
