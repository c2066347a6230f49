"""Dense attention: the oracle that every other attention op is tested against.

It builds [B, N, T, S] and is meant for short sequences only.
"""

import jax.numpy as jnp

from lct.ops.masks import visible


def attention(q, k, v, q_positions, k_positions, q_segments, k_segments):
    """softmax(q k^T / sqrt(H) + mask) v with grouped key/value heads, in float32.

    Args:
      q: [B, T, N, H]; k, v: [B, S, K, H]; query head n uses key/value head n // (N / K).
      positions and segment ids: int32 [B, T] and [B, S].
    Returns:
      out [B, T, N, H] and the natural log-sum-exp lse [B, T, N], float32. A row that sees nothing has
      out 0 and lse -inf.
    """
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    batch, t, n, h = q.shape
    kv_heads = k.shape[2]
    grouped = q.astype(dtype).reshape(batch, t, kv_heads, n // kv_heads, h)
    scores = jnp.einsum('BTKGH,BSKH->BTKGS', grouped, k.astype(dtype), precision='highest') * h**-0.5
    mask = visible(q_positions, k_positions, q_segments, k_segments)[:, :, None, None, :]
    scores = jnp.where(mask, scores, -jnp.inf)
    top = jnp.max(scores, axis=-1, keepdims=True)
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    weights = jnp.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    out = jnp.einsum('BTKGS,BSKH->BTKGH', weights, v.astype(dtype), precision='highest')
    out = out / jnp.where(total == 0, 1.0, total)
    lse = (jnp.log(total) + top)[..., 0]
    return out.reshape(batch, t, n, h), lse.reshape(batch, t, n)
