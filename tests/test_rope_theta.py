"""Rules and laws for RoPE's theta, against every published value: literal tables, each with its source."""

import math

import numpy as np
import pytest

from lct.ops import rope, theta
from lct.ops.rope import RopeConfig

K, M = 1 << 10, 1 << 20


# ---------------------------------------------------------------------------------------------------
# Rules
# ---------------------------------------------------------------------------------------------------

# theta before, lengths before and after, theta after: the cards of Gradient's Llama-3 8B and 70B
GRADIENT = [
    (500_000, 8 * K, 64 * K, 15_296_098),
    (15_296_098, 64 * K, 256 * K, 207_112_184),
    (207_112_184, 256 * K, 512 * K, 1_062_356_830),
    (207_112_184, 256 * K, M, 2_804_339_835),
]
CRITICAL = [  # theta, trained length, target, critical base, relative precision of what is printed
    (500_000, 8 * K, M, 3_580_165_449, 1e-9),  # card of Gradient's 70B at 1048k
    (500_000, 8 * K, 4 * M, 45.2e9, 1e-3),  # card of Gradient's 8B at 4194k
    (10_000, 4 * K, 64 * K, 514_640, 1e-6),  # AMD Instella-Long
    (10_000, 4 * K, 256 * K, 3_691_950, 1e-6),
    (10_000, 4 * K, 16 * K, 71_738, 1e-5),  # arXiv 2310.05209 with Llama-2 tuned at 16K
]
# thetas that their authors chose by trial, from Llama-2 (1e4, 4K): length, theta, above the lower bound
GIVEN = [
    ('LWM-Text', 32 * K, 1e6, True), ('LWM-Text', 128 * K, 1e7, True), ('LWM-Text', 256 * K, 1e7, False),
    ('LWM-Text', 512 * K, 25e6, False), ('LWM-Text', M, 50e6, False),
    ('EasyContext', 32 * K, 1e6, True), ('EasyContext', 64 * K, 5e6, True),
    ('EasyContext', 256_000, 50e6, True),
    ('EasyContext', 512_000, 250e6, True),
]


@pytest.mark.parametrize(('before', 'old', 'new', 'after'), GRADIENT)
def test_gradient_follows_dynamic_ntk_with_alpha_4(before, old, new, after):
    assert int(rope.dynamic_ntk_theta(before, old, new, alpha=4, head_dim=128)) == after


@pytest.mark.parametrize(('base', 'trained', 'target', 'printed', 'precision'), CRITICAL)
def test_critical_base(base, trained, target, printed, precision):
    assert math.isclose(rope.critical_base(base, trained, target), printed, rel_tol=precision)


def test_ntk_is_dynamic_ntk_with_alpha_1_and_stretches_the_longest_period_by_the_scale():
    assert rope.ntk_theta(5e5, 8.0, head_dim=128) == rope.dynamic_ntk_theta(5e5, 1, 8, alpha=1, head_dim=128)
    thetas = 5e5, rope.ntk_theta(5e5, 8.0, head_dim=128)
    before, after = (rope.frequencies(RopeConfig(x), 128)[0] for x in thetas)
    assert math.isclose(before[-1] / after[-1], 8.0)
    for target, printed in ((64 * K, 4.13e6), (256 * K, 16.9e6), (512 * K, 34.2e6), (M, 69.1e6)):
        assert math.isclose(rope.ntk_theta(5e5, target / (8 * K), head_dim=128), printed, rel_tol=3e-3)


def test_dynamic_scaling_is_the_rule_at_the_length_that_is_read():
    dynamic = RopeConfig(5e5, 'dynamic', 4.0, max_position=8 * K)
    by_rule = RopeConfig(rope.dynamic_ntk_theta(5e5, 8 * K, 64 * K, alpha=4, head_dim=128))
    inv_freq, expected = rope.frequencies(dynamic, 128, 64 * K)[0], rope.frequencies(by_rule, 128)[0]
    np.testing.assert_array_equal(inv_freq, expected)


# ---------------------------------------------------------------------------------------------------
# Scaling laws of RoPE-based extrapolation
# ---------------------------------------------------------------------------------------------------

BOUNDS = [  # tuned theta, base theta, trained length, H, tokens (arXiv 2310.05209, Theorem 3)
    (5e5, 1e4, 4 * K, 128, 78.4e3), (1e6, 1e4, 4 * K, 128, 129.0e3), (2e6, 1e4, 4 * K, 128, 212.3e3),
    (15_296_098, 5e5, 8 * K, 128, 53.4e3), (207_112_184, 5e5, 8 * K, 128, 221.9e3),
    (1_062_356_830, 5e5, 8 * K, 128, 542.5e3), (2_804_339_835, 5e5, 8 * K, 128, 921.7e3),
    (3_580_165_449, 5e5, 8 * K, 128, 1.054e6), (45.2e9, 5e5, 8 * K, 128, 4.22e6),
]
# of Llama-3
INVERSE = [(64 * K, 22.27e6), (256 * K, 281.0e6), (512 * K, 998e6), (M, 3.545e9), (4 * M, 44.7e9)]


def test_critical_dimension():
    # Llama-2, arXiv 2310.05209: the last 36 dims are the cause
    assert theta.critical_dimension(1e4, 4 * K, 128) == 92
    assert theta.critical_dimension(5e5, 8 * K, 128) == 70  # Llama-3
    assert theta.critical_dimension(100, 8 * K, 128) == 128  # a base so small that every dim has turned
    with pytest.raises(ValueError, match='6 tokens'):
        theta.critical_dimension(1e4, 6, 128)


@pytest.mark.parametrize(('base', 'trained'), [(1e4, 4 * K), (5e5, 8 * K), (1e5, 8 * K), (3134, 512)])
@pytest.mark.parametrize('head_dim', [32, 64, 128])
def test_critical_dimension_counts_the_periods_within_the_trained_length(base, trained, head_dim):
    periods = 2 * math.pi / rope.frequencies(RopeConfig(base), head_dim)[0]
    assert theta.critical_dimension(base, trained, head_dim) == 2 * int((periods < trained).sum())


@pytest.mark.parametrize(('tuned', 'base', 'trained', 'head_dim', 'tokens'), BOUNDS)
def test_extrapolation_bound_and_its_inverse(tuned, base, trained, head_dim, tokens):
    bound = rope.extrapolation_bound(tuned, base, trained, head_dim)
    assert math.isclose(bound, tokens, rel_tol=1e-3)
    assert math.isclose(theta.theta_for_bound(bound, base, trained, head_dim), tuned, rel_tol=1e-9)


@pytest.mark.parametrize(('target', 'needed'), INVERSE)
def test_theta_for_a_bound_of_llama3(target, needed):
    assert math.isclose(theta.theta_for_bound(target, 5e5, 8 * K, 128), needed, rel_tol=1e-3)


def test_small_bases_of_4096():
    assert [round(x) for x in theta.small_bases(4096)] == [2608, 1304, 652]  # arXiv 2310.05209


# ---------------------------------------------------------------------------------------------------
# Base of RoPE bounds context length
# ---------------------------------------------------------------------------------------------------

LOWER = [  # thousands of tokens, table 2 of arXiv 2405.14591, ours where it differs; heads of 128 dims
    (1, 4.3e3, None), (2, 1.6e4, None), (4, 2.7e4, None), (8, 8.4e4, None), (16, 3.1e5, 3.2e5),
    (32, 6.4e5, 6.3e5),
    (64, 2.1e6, None), (128, 7.8e6, None), (256, 3.6e7, 3.3e7), (512, 6.4e7, 6.5e7), (1000, 5.1e8, 3.5e8),
]


@pytest.mark.parametrize(('thousands', 'printed', 'ours'), LOWER[:5])
def test_lower_bound_reproduces_table_2(thousands, printed, ours):
    assert theta.lower_bound(1000 * thousands, 128) == pytest.approx(ours or printed, rel=1e-12)


@pytest.mark.parametrize(('thousands', 'printed', 'ours'), LOWER[5:])
def test_long_lower_bounds_are_the_first_to_hold(thousands, printed, ours):
    """As above without the whole search: ours holds, and the two digits before it do not."""
    bound, exponent = ours or printed, np.arange(0, 128, 2) / 128
    step = 10 ** (math.floor(math.log10(bound)) - 1)
    reach = [theta.similar_len((bound - i * step) ** -exponent, 1000 * thousands) for i in range(3)]
    assert reach[0] == 1000 * thousands > max(reach[1:])


def test_similarity_is_its_sum():
    inv_freq = rope.frequencies(RopeConfig(1e4), 64)[0]
    at = np.array([0, 1, 255, 256, 257, 9_999])
    direct = np.cos(at[:, None] * inv_freq).sum(1)
    np.testing.assert_allclose(theta.similarity(inv_freq, 0, 10_000)[at], direct, atol=1e-9)
    np.testing.assert_allclose(theta.similarity(inv_freq, 9_990, 10_000)[-1], direct[-1], atol=1e-9)


@pytest.mark.parametrize(
    ('base', 'head_dim', 'tokens'), [(1e4, 128, 1706), (5e5, 128, 18437), (1e5, 64, 3615)])
def test_similar_len_ends_before_the_first_negative_similarity(base, head_dim, tokens):
    inv_freq = rope.frequencies(RopeConfig(base), head_dim)[0]
    assert theta.similar_len(inv_freq, M) == tokens
    assert theta.similar_len(inv_freq, 1000) == 1000
    direct = np.cos(np.arange(tokens + 2)[:, None] * inv_freq).sum(1)
    assert direct[-1] < 0 <= direct[:-1].min()


def test_similar_len_of_interpolated_positions_is_stretched():
    near, far = (RopeConfig(1e4), RopeConfig(1e4, 'linear', 8.0))
    near, far = (theta.similar_len(rope.frequencies(x, 128)[0], M) for x in (near, far))
    assert math.isclose(far, 8 * near, rel_tol=0.01)


@pytest.mark.parametrize(('recipe', 'length', 'chosen', 'above'), GIVEN)
def test_thetas_chosen_by_trial_lie_above_the_critical_base_and_not_all_above_the_lower_bound(
        recipe, length, chosen, above):
    assert chosen > rope.critical_base(1e4, 4 * K, length)
    printed = max(bound for thousands, bound, _ in LOWER if 1000 * thousands <= length)
    assert (chosen >= printed) == above
