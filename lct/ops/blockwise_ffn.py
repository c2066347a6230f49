"""The other half of the Blockwise Parallel Transformer (Liu & Abbeel 2023, section 3): the FFN in chunks."""

import jax
import jax.numpy as jnp
from jax import lax


def blockwise_ffn(ffn, x, num_chunks):
    """ffn(x) for x [B, T, D], computed num_chunks pieces of the sequence one after the other.

    Only one piece's [B, T / num_chunks, F] activations exist at a time; the backward recomputes them.
    Pieces are strided (token t goes to piece t % num_chunks) so that every piece still spans all devices
    of a sharded sequence.

    Raises:
      ValueError: if num_chunks does not divide T.
    """
    batch, length, dim = x.shape
    if num_chunks == 1:
        return ffn(x)
    if length % num_chunks:
        raise ValueError(f'seq_len {length} is not a multiple of ffn_chunks {num_chunks}; use a divisor')
    pieces = jnp.moveaxis(x.reshape(batch, length // num_chunks, num_chunks, dim), 2, 0)
    out = lax.map(jax.checkpoint(ffn), pieces)
    return jnp.moveaxis(out, 0, 2).reshape(x.shape)
