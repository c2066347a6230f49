"""The next token of each row, from the logits: the likeliest, or drawn.

Letters: B batch, V vocab.
"""

import dataclasses

import jax
import jax.numpy as jnp

from lct import sharding


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Tokens drawn at a temperature from the likeliest words whose probabilities together reach top_p."""

    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self):
        if not (0 < self.temperature < float('inf') and 0 < self.top_p <= 1):
            raise ValueError(f'temperature {self.temperature} must be above 0 and top_p {self.top_p} in (0, 1]; for '
                             'the likeliest token every time use no Sampling')


def choose(logits, number, sampling, key):
    """int32 [B] from logits [B, V]: each row's new token with that number.

    sampling, key: a Sampling and its jax.random key; None for the likeliest token.
    """
    # The vocabulary is gathered: one row per prompt is small.
    logits = sharding.reshard(logits, sharding.spec('BD'))
    if sampling is None:
        return jnp.argmax(logits, -1).astype(jnp.int32)
    return draw(logits, jax.random.fold_in(key, number), sampling)


def judge(logits, tokens):
    """-> float32 [B], the log-likelihood in nats of the tokens [B] after logits [B, V], and bool [B], whether each is
    the likeliest."""
    logits = sharding.reshard(logits, sharding.spec('BD'))
    hit = jnp.arange(logits.shape[-1]) == tokens[:, None]
    likely = jnp.where(hit, logits, 0).sum(-1) - jax.nn.logsumexp(logits, -1)
    return likely, jnp.argmax(logits, -1) == tokens


def draw(logits, key, sampling):
    """Words [B] drawn from logits [B, V] (nucleus sampling, Holtzman et al. 2020)."""
    logits = (logits - logits.max(-1, keepdims=True)) / sampling.temperature  # 0 or less: nothing overflows
    if sampling.top_p == 1:
        return jax.random.categorical(key, logits).astype(jnp.int32)
    ordered = jnp.sort(logits, -1, descending=True)
    before = jnp.cumsum(jax.nn.softmax(ordered, -1), -1) - jax.nn.softmax(ordered, -1)
    least = jnp.where(before < sampling.top_p, ordered, jnp.inf).min(-1, keepdims=True)
    return jax.random.categorical(key, jnp.where(logits < least, -jnp.inf, logits)).astype(jnp.int32)
