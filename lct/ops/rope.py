"""Rotary position embedding: frequencies of the six published scalings, and accurate angles at any length.

Letters: B batch, T sequence, N heads, H head_dim. Rotary dims are in the half-split order of Hugging
Face: dim i is paired with dim i + H/2. (Su et al. 2021, arXiv 2104.09864, interleave the pairs; the two
orders differ by a permutation of the rows of wq and wk.)
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

# The rules for theta are in ops/theta.py; these are public names of this module too.
from lct.ops.theta import critical_base, dynamic_ntk_theta, extrapolation_bound, ntk_theta  # noqa: F401

TYPES = ('default', 'linear', 'dynamic', 'yarn', 'longrope', 'llama3')
NEED_ORIGINAL = ('yarn', 'longrope', 'llama3')

LO = 4096  # entries of the fine table; position = hi * LO + lo
MIN_HI = 1024  # at least 4M positions, so that table shapes and compiled programs do not depend on length


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """One rotary embedding, with the fields of Hugging Face's rope_parameters.

    max_position is the trained length of type 'dynamic' (max_position_embeddings of the model's config).
    long_factor and short_factor have H/2 numbers; 'longrope' derives only its attention factor from factor.
    """

    theta: float
    type: str = 'default'
    factor: float = 1.0
    original_max_position: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    long_factor: tuple[float, ...] | None = None
    short_factor: tuple[float, ...] | None = None
    max_position: int | None = None

    def __post_init__(self):
        if self.type not in TYPES:
            raise ValueError(f'rope type {self.type!r} is unknown; use one of {", ".join(TYPES)}')
        self._check_numbers()
        self._check_lengths()
        if self.type == 'llama3':
            self._check_llama3()
        elif self.type == 'yarn':
            self._check_yarn()
        elif self.type == 'longrope':
            self._check_longrope()

    def _check_numbers(self):
        rules = ('theta', 1, 500000.0), ('factor', 1, 8.0), ('attention_factor', 0, 1.0)
        for field, minimum, example in rules:
            value = getattr(self, field)
            if field == 'attention_factor' and value is None:
                continue
            if not (_is_number(value) and value >= minimum):
                raise ValueError(
                    f'rope {field} {value!r} must be a number >= {minimum}, for example {example}')
        if self.type == 'default' and self.factor != 1:
            raise ValueError(f"rope factor {self.factor} does nothing in type 'default'; name a scaling")

    def _check_lengths(self):
        for field, types in (('original_max_position', NEED_ORIGINAL), ('max_position', ('dynamic',))):
            value = getattr(self, field)
            if (self.type in types or value is not None) and (type(value) is not int or value < 2):
                raise ValueError(f'rope type {self.type!r} needs an integer {field} >= 2, got {value!r}')

    def _check_llama3(self):
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f'rope low_freq_factor {self.low_freq_factor} must be positive and below high_freq_factor '
                f'{self.high_freq_factor}; Llama-3.1 uses 1.0 and 4.0')

    def _check_yarn(self):
        if not (self.beta_fast > self.beta_slow > 0 and self.theta > 1):
            raise ValueError(
                f'yarn needs beta_fast {self.beta_fast} > beta_slow {self.beta_slow} > 0 and theta '
                f'{self.theta} > 1; the paper uses 32 and 1')

    def _check_longrope(self):
        for field in ('long_factor', 'short_factor'):
            values = getattr(self, field)
            if not (isinstance(values, tuple) and values and all(_is_number(x) and x > 0 for x in values)):
                raise ValueError(f'longrope needs {field}, a tuple of head_dim/2 positive numbers')


def _is_number(x):
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)


# ---------------------------------------------------------------------------------------------------
# Frequencies
# ---------------------------------------------------------------------------------------------------


def inverse_frequencies(config: Any, seq_len: int | None = None) -> tuple[np.ndarray, float]:
    """(inv_freq float64 [H/2], attention_factor) of a LlamaConfig.

    seq_len, the longest position of the batch plus one, is used by 'dynamic' and 'longrope' alone. The
    attention factor multiplies cos and sin, and so multiplies scores by its square.
    """
    return frequencies(config.rope, config.head_dim, seq_len)


def frequencies(rope: RopeConfig, head_dim: int, seq_len: int | None = None) -> tuple[np.ndarray, float]:
    """(inv_freq float64 [H/2], attention_factor) of a RopeConfig, as in transformers 5's modeling_rope_utils.

    Raises:
      ValueError: if head_dim is odd, or the number of 'longrope' divisors is not head_dim / 2.
    """
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f'head_dim {head_dim} must be even: RoPE rotates pairs of dims')
    exponent = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    if rope.type == 'dynamic':
        theta = rope.theta
        if seq_len is not None and seq_len > rope.max_position:
            theta = dynamic_ntk_theta(
                theta, rope.max_position, seq_len, alpha=rope.factor, head_dim=head_dim)
        return theta**-exponent, 1.0
    inv_freq = rope.theta**-exponent
    if rope.type == 'linear':
        return inv_freq / rope.factor, 1.0  # position interpolation, Chen et al. 2023, arXiv 2306.15595
    if rope.type == 'llama3':
        return _llama3(inv_freq, rope), 1.0
    if rope.type == 'yarn':
        inv_freq, attention_factor = _yarn(inv_freq, rope, head_dim)
    elif rope.type == 'longrope':
        inv_freq, attention_factor = _longrope(inv_freq, rope, seq_len)
    else:
        return inv_freq, 1.0
    return inv_freq, attention_factor if rope.attention_factor is None else float(rope.attention_factor)


def _llama3(inv_freq, rope):
    """Llama-3.1: the frequencies of long wavelengths are divided by factor, short ones are kept, with a
    linear blend between (meta-llama/llama-models, models/llama3/model.py, apply_scaling)."""
    periods = rope.original_max_position * inv_freq / (2 * math.pi)  # within the trained length
    kept = (periods - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = np.clip(kept, 0.0, 1.0)
    return inv_freq * (kept + (1 - kept) / rope.factor)


def _yarn(inv_freq, rope, head_dim):
    """NTK-by-parts of YaRN (Peng et al. 2023, arXiv 2309.00071, section 3.2)."""

    def dim_of(periods):  # the rotary dim with this many periods within the trained length
        return head_dim * math.log(rope.original_max_position / (periods * 2 * math.pi)) / (
            2 * math.log(rope.theta))

    low, high = dim_of(rope.beta_fast), dim_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # as in the reference: a ramp of width 0 would divide by 0
    ramp = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0.0, 1.0)

    def scale(weight):
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    both = rope.mscale and rope.mscale_all_dim
    attention_factor = scale(rope.mscale) / scale(rope.mscale_all_dim) if both else scale(1.0)
    return inv_freq * (ramp / rope.factor + (1 - ramp)), attention_factor


def _longrope(inv_freq, rope, seq_len):
    """LongRoPE (Ding et al. 2024, arXiv 2402.13753): one searched divisor per frequency, with a second set
    for batches longer than the trained length."""
    name = 'long_factor' if seq_len is not None and seq_len > rope.original_max_position else 'short_factor'
    divisors = np.asarray(getattr(rope, name), np.float64)
    if divisors.shape != inv_freq.shape:
        raise ValueError(f'rope {name} has {len(divisors)} numbers but head_dim/2 is {len(inv_freq)}')
    attention_factor = math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_max_position))
    return inv_freq / divisors, attention_factor


# ---------------------------------------------------------------------------------------------------
# Angles and rotation
# ---------------------------------------------------------------------------------------------------


class Tables(struct.PyTreeNode):
    """cos and sin of the angles of hi * LO and of lo, float32 and each correctly rounded."""

    hi_cos: jax.Array  # [max(seq_len / LO, MIN_HI), H/2]
    hi_sin: jax.Array
    lo_cos: jax.Array  # [LO, H/2]
    lo_sin: jax.Array
    attention_factor: jax.Array  # []


def make_tables(rope: RopeConfig, head_dim: int, seq_len: int) -> Tables:
    """Tables of a RopeConfig for positions below seq_len, replicated on the current mesh.

    float32(position) * inv_freq is wrong by 0.03 rad at 1M positions and 0.15 rad at 4M. Here every table
    entry is computed in float64 on the host, and angle addition adds only one or two rounding errors.
    """
    inv_freq, attention_factor = frequencies(rope, head_dim, seq_len)
    rows = max(MIN_HI, 1 << (-(-seq_len // LO) - 1).bit_length())
    hi = np.arange(rows, dtype=np.float64)[:, None] * LO * inv_freq
    lo = np.arange(LO, dtype=np.float64)[:, None] * inv_freq
    arrays = (np.cos(hi), np.sin(hi), np.cos(lo), np.sin(lo), np.asarray(attention_factor))
    arrays = [x.astype(np.float32) for x in arrays]
    no_mesh = jax.sharding.get_abstract_mesh().empty
    place = jax.device_put if no_mesh else lambda x: jax.device_put(x, P())
    return Tables(*map(place, arrays))


def angles(tables: Tables, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(cos, sin) [B, T, 1, H/2] float32 of int32 positions [B, T], times the attention factor.

    cos(a + b) = cos a cos b - sin a sin b with a from hi and b from lo. A position outside the tables
    gives NaN, not a neighbour's angle.
    """
    hi, lo = positions // LO, positions % LO
    hi_cos, hi_sin = _rows(tables.hi_cos, hi), _rows(tables.hi_sin, hi)
    lo_cos, lo_sin = _rows(tables.lo_cos, lo), _rows(tables.lo_sin, lo)
    cos = (hi_cos * lo_cos - hi_sin * lo_sin) * tables.attention_factor
    sin = (hi_sin * lo_cos + hi_cos * lo_sin) * tables.attention_factor
    return cos[:, :, None, :], sin[:, :, None, :]


def angles_if(rotates: jax.Array, angles: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The angles (cos, sin) if rotates, bool [], else those that leave every vector exactly as it is."""
    cos, sin = angles
    return jnp.where(rotates, cos, 1), jnp.where(rotates, sin, 0)


def _rows(table, index):
    """table[index] with the sharding of index, which a gather on an Explicit mesh must name."""
    index = jnp.where(index < 0, table.shape[0], index)  # a negative index would count from the end
    mesh = jax.sharding.get_abstract_mesh()
    out = None
    if AxisType.Explicit in mesh.axis_types:
        out = P(*jax.typeof(index).sharding.spec, None)
    return table.at[index].get(mode='fill', fill_value=jnp.nan, out_sharding=out)


def rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate x [B, T, N, H] by angles (cos, sin [B, T, 1, H/2]) in float32; the result has x's dtype."""
    cos, sin = angles
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
