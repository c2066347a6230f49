"""The next token of each row from its logits: the argmax, or a sample.

Letters: B batch, V vocab.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from lct import sharding


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Sampling at a temperature from the most likely tokens whose probabilities add up to top_p.

    A program takes both as arguments: another temperature needs no other program.

    Raises:
      ValueError: for a temperature or a top_p out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self):
        if not (0 < self.temperature < float('inf') and 0 < self.top_p <= 1):
            raise ValueError(f'temperature {self.temperature} must be above 0 and top_p {self.top_p} in '
                             '(0, 1]; for greedy decoding use no Sampling')


def _unflatten(_, values):
    """A Sampling of what a program is traced with, which cannot be checked."""
    out = object.__new__(Sampling)
    for name, value in zip(('temperature', 'top_p'), values, strict=True):
        object.__setattr__(out, name, value)
    return out


jax.tree_util.register_pytree_node(Sampling, lambda one: ((one.temperature, one.top_p), None), _unflatten)


def at_temperature(temperature: float, top_p: float = 1.0) -> Sampling | None:
    """The Sampling of a request; None, which is greedy decoding, for temperature 0, whatever top_p is.

    Raises:
      ValueError: for a temperature or a top_p out of range.
    """
    sampling = Sampling(temperature or 1.0, top_p)
    return sampling if temperature else None


def next_token(logits: jax.Array, step: jax.Array | int, sampling: Sampling | None,
               key: jax.Array | None) -> jax.Array:
    """int32 [B] from logits [B, V]: the new token of each row.

    step: index of the token in its answer. sampling, key: a Sampling and its jax.random key; None: argmax.
    """
    # The vocabulary is gathered: one row per prompt is small.
    logits = sharding.reshard(logits, sharding.spec('BD'))
    if sampling is None:
        return jnp.argmax(logits, -1).astype(jnp.int32)
    return sample(logits, jax.random.fold_in(key, step), sampling)


def token_logprob(logits: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(log-probabilities in nats, float32 [B]; whether each is the argmax, bool [B]) of tokens int32 [B]
    under logits [B, V]."""
    logits = sharding.reshard(logits, sharding.spec('BD'))
    hit = jnp.arange(logits.shape[-1]) == tokens[:, None]
    logprob = jnp.where(hit, logits, 0).sum(-1) - jax.nn.logsumexp(logits, -1)
    return logprob, jnp.argmax(logits, -1) == tokens


def top_logprobs(logits: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """(log-probabilities in nats, float32 [B, count]; their tokens, int32) of the most likely tokens under
    logits [B, V], as many as there are."""
    logits = sharding.reshard(logits, sharding.spec('BD'))
    top, tokens = lax.top_k(logits, min(count, logits.shape[-1]))
    return top - jax.nn.logsumexp(logits, -1, keepdims=True), tokens


def sample(logits: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    """Tokens int32 [B] sampled from logits [B, V] (nucleus sampling, Holtzman et al. 2020)."""
    logits = (logits - logits.max(-1, keepdims=True)) / sampling.temperature  # 0 or less: nothing overflows
    logits = lax.cond(sampling.top_p < 1, lambda x: _nucleus(x, sampling.top_p), lambda x: x, logits)
    return jax.random.categorical(key, logits).astype(jnp.int32)


def _nucleus(logits, top_p):
    """The logits [B, V] of the most likely tokens whose probabilities add up to top_p; -inf elsewhere."""
    ordered = jnp.sort(logits, -1, descending=True)
    before = jnp.cumsum(jax.nn.softmax(ordered, -1), -1) - jax.nn.softmax(ordered, -1)
    least = jnp.where(before < top_p, ordered, jnp.inf).min(-1, keepdims=True)
    least = jnp.minimum(least, ordered[:, :1])  # the most likely one, also where top_p rounds to 0
    return jnp.where(logits < least, -jnp.inf, logits)
