"""RoPE theta for a context length: the rules that choose it, and the laws that bound the context it supports.

H is head_dim, T a length in tokens. The frequencies are theta^(-2i/H), i < H/2; a period is 2 pi / frequency.
Sources:
  NTK-aware interpolation: bloc97 2023, in YaRN (Peng et al. 2023, arXiv 2309.00071, section 3.1).
  SCALING: Scaling Laws of RoPE-based Extrapolation (Liu et al. 2023, arXiv 2310.05209). The base model's own
    theta stands for the paper's 10000.
  BOUNDS: Base of RoPE Bounds Context Length (Men et al. 2024, arXiv 2405.14591).
"""

import itertools
import math

import numpy as np

TILE = 256  # distances in one row of a matmul
MAX_DISTANCES = 1 << 20  # in one matmul


# ---------------------------------------------------------------------------------------------------
# Rules
# ---------------------------------------------------------------------------------------------------


def ntk_theta(theta: float, scale: float, *, head_dim: int) -> float:
    """NTK-aware base: theta * scale^(H / (H - 2)); the longest period grows by scale."""
    return theta * scale ** (head_dim / (head_dim - 2))


def dynamic_ntk_theta(
    theta: float, old_len: float, new_len: float, *, alpha: float, head_dim: int
) -> float:
    """Dynamic-NTK base: theta * (alpha * new/old - (alpha - 1))^(H / (H - 2)).

    Applied from stage to stage with alpha 4 it gives the thetas of Gradient's Llama-3 cards to the
    integer; within a model it is Hugging Face's 'dynamic' scaling with factor alpha.
    """
    return ntk_theta(theta, alpha * new_len / old_len - (alpha - 1), head_dim=head_dim)


# ---------------------------------------------------------------------------------------------------
# SCALING: periods within the trained length
# ---------------------------------------------------------------------------------------------------


def critical_dimension(theta: float, trained_len: float, head_dim: int) -> int:
    """Dims whose full period lies within trained_len (Lemma 1): 2 * ceil(H/2 * ln(T / 2 pi) / ln(theta)), at
    most H. Beyond trained_len the other dims rotate by angles that never occurred in training."""
    return min(2 * math.ceil(head_dim / 2 * _log_periods(trained_len) / math.log(theta)), head_dim)


def critical_base(theta: float, trained_len: float, target_len: float) -> float:
    """Theta above which tuning at target_len also extrapolates (Theorem 3):
    theta^(ln(target / 2 pi) / ln(trained / 2 pi))."""
    return theta ** (_log_periods(target_len) / _log_periods(trained_len))


def extrapolation_bound(theta_new: float, theta: float, trained_len: float, head_dim: int) -> float:
    """Longest context (tokens, float) of a model trained at trained_len with theta and tuned with a theta_new
    above the critical base (Theorem 3): the new period of the first dim without a full period in training,
    2 pi * theta_new^(d_extra / H)."""
    return 2 * math.pi * theta_new ** (critical_dimension(theta, trained_len, head_dim) / head_dim)


def theta_for_bound(target_len: float, theta: float, trained_len: float, head_dim: int) -> float:
    """The theta whose extrapolation_bound is target_len: (T / 2 pi)^(H / d_extra), Theorem 3 inverted."""
    return math.exp(_log_periods(target_len) * head_dim / critical_dimension(theta, trained_len, head_dim))


def small_bases(tuned_len: float) -> tuple[float, float, float]:
    """(2 T / pi, T / pi, T / 2 pi): thetas below which every dim has a quarter, a half, a whole period within
    tuned_len. In this other regime of the law quality declines gradually, without a bound."""
    return 2 * tuned_len / math.pi, tuned_len / math.pi, tuned_len / (2 * math.pi)


def _log_periods(length):
    """ln(T / 2 pi)."""
    if length <= 2 * math.pi:
        raise ValueError(f'a length of {length} tokens is not above 2 pi, where the scaling law begins; '
                         'use at least 7')
    return math.log(length / (2 * math.pi))


# ---------------------------------------------------------------------------------------------------
# BOUNDS: the advantage of similar keys
# ---------------------------------------------------------------------------------------------------


def similarity(inv_freq: np.ndarray, start: int, stop: int) -> np.ndarray:
    """B(m) = sum over i of cos(m * inv_freq[i]) for the distances start <= m < stop, float64 [stop - start]:
    how much more a query favours a similar key over a random one at distance m.

    cos((high + low) f) = cos(high f) cos(low f) - sin(high f) sin(low f), so that millions of distances are
    one matmul.
    """
    low = np.arange(TILE)[:, None] * inv_freq
    high = np.arange(start, stop, TILE, dtype=np.float64)[:, None] * inv_freq
    left = np.concatenate([np.cos(high), -np.sin(high)], axis=1)
    right = np.concatenate([np.cos(low), np.sin(low)], axis=1)
    return (left @ right.T).reshape(-1)[:stop - start]


def similar_len(inv_freq: np.ndarray, limit: int) -> int:
    """L of the paper, at most limit: the longest context (tokens) within which similarity is never negative.
    Beyond it a model may keep its perplexity and still fail to retrieve. Models are trained beyond it too:
    Llama-2's is 1,706 of 4,096 tokens."""
    start, size = 0, TILE
    while start <= limit:
        negative = similarity(inv_freq, start, min(start + size, limit + 1)) < 0
        if negative.any():
            return start + int(negative.argmax()) - 1
        start, size = start + size, min(2 * size, MAX_DISTANCES)
    return limit


def lower_bound(context_len: int, head_dim: int) -> float:
    """The smallest theta of two significant digits with similar_len >= context_len.

    The paper defines it as the infimum over all thetas, which is lower: some smaller thetas satisfy the
    condition by chance, and some larger ones do not. The paper's table 2 prints two digits; this function
    reproduces six of its eleven values, and four more within a tenth (tests/test_rope_theta.py).
    """
    exponent = np.arange(0, head_dim, 2) / head_dim
    for power in itertools.count():
        for digits in range(10, 100):
            theta = digits * 10.0**power
            if similar_len(theta**-exponent, context_len) == context_len:
                return theta
