"""Blockwise feedforward, one chunk of tokens at a time (Liu & Abbeel 2023, arXiv 2305.19370, section 3)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax


def blockwise_ffn(ffn: Callable[[jax.Array], jax.Array], x: jax.Array, num_chunks: int) -> jax.Array:
    """ffn(x) for x [B, T, D], computed on num_chunks chunks of the sequence, one after the other.

    Only one chunk's [B, T / num_chunks, F] activations exist at a time; the backward recomputes them. Chunks
    are strided (token t belongs to chunk t % num_chunks), so that every chunk spans the whole sequence axis.

    Raises:
      ValueError: if num_chunks does not divide T.
    """
    batch, length, dim = x.shape
    if num_chunks == 1:
        return ffn(x)
    if length % num_chunks:
        raise ValueError(f'seq_len {length} is not a multiple of ffn_chunks {num_chunks}; use a divisor')
    chunks = jnp.moveaxis(x.reshape(batch, length // num_chunks, num_chunks, dim), 2, 0)
    out = lax.map(jax.checkpoint(ffn), chunks)
    return jnp.moveaxis(out, 0, 2).reshape(x.shape)
