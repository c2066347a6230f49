"""Dense attention: the oracle that every other attention op is tested against.

It builds [B, N, T, S] and is meant for short sequences only.
"""

import jax
import jax.numpy as jnp

from lct.ops.masks import Tokens, attention_mask


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, q_tokens: Tokens, k_tokens: Tokens
) -> tuple[jax.Array, jax.Array]:
    """softmax(q k^T / sqrt(H) + mask) v with grouped key/value heads, in float32.

    Args:
      q: [B, T, N, H]; k, v: [B, S, K, H]; query head n uses key/value head n // (N / K).
      q_tokens: [B, T]; k_tokens: [B, S].
    Returns:
      out [B, T, N, H] and the natural log-sum-exp lse [B, T, N], float32. A row that attends to no key has
      out 0 and lse -inf.
    """
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    batch, t, n, h = q.shape
    kv_heads = k.shape[2]
    grouped = q.astype(dtype).reshape(batch, t, kv_heads, n // kv_heads, h)
    scores = jnp.einsum('BTKGH,BSKH->BTKGS', grouped, k.astype(dtype), precision='highest') * h**-0.5
    mask = attention_mask(q_tokens, k_tokens)[:, :, None, None, :]
    scores = jnp.where(mask, scores, -jnp.inf)
    row_max = jnp.max(scores, axis=-1, keepdims=True)
    row_max = jnp.where(jnp.isfinite(row_max), row_max, 0.0)
    weights = jnp.exp(scores - row_max)
    row_sum = weights.sum(-1, keepdims=True)
    out = jnp.einsum('BTKGS,BSKH->BTKGH', weights, v.astype(dtype), precision='highest')
    out = out / jnp.where(row_sum == 0, 1.0, row_sum)
    lse = (jnp.log(row_sum) + row_max)[..., 0]
    return out.reshape(batch, t, n, h), lse.reshape(batch, t, n)
