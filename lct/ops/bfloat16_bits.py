"""bfloat16 numbers stored as their bits, which compilers for CPUs leave alone.

They compute bfloat16 in float32, and would convert the whole of a large array before a loop that reads it
tile by tile. A bfloat16 is the upper half of a float32.
"""

import jax
import jax.numpy as jnp
from jax import lax

DTYPE = jnp.dtype('uint16')


def encode(x: jax.Array) -> jax.Array:
    """uint16, the bits of x rounded to bfloat16."""
    return lax.bitcast_convert_type(x.astype(jnp.bfloat16), DTYPE)


def in_float32(bits: jax.Array) -> jax.Array:
    """The numbers of these bits."""
    return lax.bitcast_convert_type(bits.astype(jnp.uint32) << 16, jnp.float32)
