"""Weights in 8 bits: blocks of 32 integers of -127..127, and one float16 scale for each block.

This is the Q8_0 of GGML (github.com/ggml-org/ggml, ggml-quants.c), in which GGUF files hold weights: its
blocks lie along the input dim of a matrix, its scale is the largest magnitude of the block over 127. A value
is off by at most 1/254 of the largest of its block, at 34 bytes for 32 weights. Weights that were read from a
Q8_0 file are quantized to the same bits again.

int8.py, for caches, has a scale for each vector: it cannot be cut into shards along that vector.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

BLOCK, LARGEST = 32, 127


class Int8Blocks(NamedTuple):
    """Quantized weights, 17/16 bytes each; n is the dim that is cut into blocks."""

    values: Any  # int8 [..., n, ...]
    scales: Any  # float16 [..., n / 32, ...]


def quantize(x: jax.Array, axis: int) -> Int8Blocks:
    """x in blocks along an axis, whose size is a multiple of 32."""
    blocks = _split(x.astype(jnp.float32), axis)
    scales = jnp.abs(blocks).max(axis % x.ndim + 1, keepdims=True) / LARGEST
    ratios = blocks * jnp.where(scales > 0, 1 / scales, 0)  # zeros stay zeros
    sizes = jnp.abs(ratios)
    below = jnp.floor(sizes)
    values = jnp.sign(ratios) * (below + jnp.floor(2 * (sizes - below)))  # halves away from zero, as in C
    return Int8Blocks(values.astype(jnp.int8).reshape(x.shape),
                      scales.squeeze(axis % x.ndim + 1).astype(jnp.float16))


def dequantize(x: Int8Blocks, axis: int, dtype: Any = jnp.float32) -> jax.Array:
    """The weights in dtype; axis as in quantize."""
    scales = jnp.expand_dims(x.scales.astype(jnp.float32), axis % x.values.ndim + 1)
    return (_split(x.values.astype(jnp.float32), axis) * scales).astype(dtype).reshape(x.values.shape)


def _split(x, axis):
    """x with the axis cut into [n / 32, 32]."""
    axis %= x.ndim
    return x.reshape(*x.shape[:axis], x.shape[axis] // BLOCK, BLOCK, *x.shape[axis + 1:])
