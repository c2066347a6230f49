"""Vectors in 8 bits: integers of -127..127 and one scale for each vector.

At 8 bits a scale per head and token keeps the accuracy of a model: LMDeploy quantizes its int8 cache so and
calls it almost lossless. At 2 and 3 bits it does not: keys have a few channels of large magnitude, so KIVI
(Liu et al. 2024) and KVQuant (Hooper et al. 2024) scale keys per channel. A channel's range is known only
after the text, which takes calibration or a window of recent keys in full precision; the range of a vector is
known at once, so that a token is written once and never again.

Scales are bfloat16, stored as their bits.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lct.ops import bfloat16_bits

LARGEST = 127


class Int8Vectors(NamedTuple):
    """Quantized vectors, (1 + 2 / H) bytes a number."""

    values: jax.Array  # int8 [..., H]
    scales: jax.Array  # uint16 [...], the bits of a bfloat16


def quantize(x: jax.Array) -> Int8Vectors:
    """Vectors x [..., H] in 8 bits, each number off by at most half a scale: 1/254 of the largest of its
    vector."""
    x = x.astype(jnp.float32)
    scales = (jnp.abs(x).max(-1) / LARGEST).astype(jnp.bfloat16)
    divisors = jnp.where(scales > 0, scales, 1).astype(jnp.float32)  # zeros stay zeros
    values = jnp.round(x / divisors[..., None]).astype(jnp.int8)
    return Int8Vectors(values, bfloat16_bits.encode(scales))


def factors(x: jax.Array | Int8Vectors) -> tuple[jax.Array, jax.Array | float]:
    """float32 [..., H] and scales [...] whose product is x; scales 1.0 for vectors that are not quantized."""
    if isinstance(x, Int8Vectors):
        return x.values.astype(jnp.float32), bfloat16_bits.in_float32(x.scales)
    return bfloat16_bits.in_float32(x) if x.dtype == bfloat16_bits.DTYPE else x.astype(jnp.float32), 1.0


def dequantize(x: jax.Array | Int8Vectors) -> jax.Array:
    """The vectors [..., H] in float32; those that are not quantized in their own dtype."""
    if not isinstance(x, Int8Vectors):
        return lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == bfloat16_bits.DTYPE else x
    values, scales = factors(x)
    return values * scales[..., None]
