"""Frequencies against transformers, angles against float64. Rules for theta: test_rope_theta.py."""

import collections
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_hf

from lct import sharding
from lct.ops import rope
from lct.weights.llama_config import config_from_json

GOLDEN = pathlib.Path(__file__).parent / 'golden'
MILLION = 1 << 20
# written by experiments/golden/make_golden_rope.py
SCALINGS = json.loads((GOLDEN / 'rope_scalings.json').read_text())['cases']


@pytest.mark.parametrize('name', tiny_hf.ROPE_CASES)
def test_frequencies_match_transformers(name):
    golden = np.load(GOLDEN / 'rope.npz')
    config = config_from_json(tiny_hf.rope_config_json(name))
    inv_freq, attention_factor = rope.inverse_frequencies(config, tiny_hf.ROPE_CASES[name][3])
    assert inv_freq.dtype == np.float64
    # transformers computes them in float32: a few roundings of a power
    np.testing.assert_allclose(inv_freq, golden[f'{name}/inv_freq'], rtol=1e-6)
    assert math.isclose(attention_factor, golden[f'{name}/attention_factor'], rel_tol=1e-12)


@pytest.mark.parametrize('i', range(len(SCALINGS)))
def test_scalings_match_transformers(i):
    case = SCALINGS[i]
    rope_fields = 'rope_theta', 'rope_scaling'
    plain = {name: value for name, value in tiny_hf.BASE.items() if name not in rope_fields}
    settings = {name: case[name] for name in ('rope_parameters', 'max_position_embeddings', 'head_dim')}
    config = config_from_json(plain | settings)
    inv_freq, attention_factor = rope.inverse_frequencies(config, case['seq_len'])
    np.testing.assert_allclose(inv_freq, case['inv_freq'], rtol=1e-6)
    assert math.isclose(attention_factor, case['attention_factor'], rel_tol=1e-6)


def test_every_scaling_is_compared_in_ten_settings_and_more():
    counts = collections.Counter(case['rope_parameters']['rope_type'] for case in SCALINGS)
    assert set(counts) == set(rope.TYPES) - {'default'}
    assert min(counts.values()) > 10
    results = 'inv_freq', 'attention_factor'
    settings = {json.dumps([case[x] for x in case if x not in results]) for case in SCALINGS}
    assert len(settings) == len(SCALINGS)


@pytest.mark.parametrize('head_dim', [64, 128])
def test_angles_match_float64_to_four_million(head_dim):
    config = rope.RopeConfig(theta=500000.0)
    draw = np.random.default_rng(0)
    positions = np.concatenate([
        np.arange(512), draw.integers(0, 4 * MILLION, 4000), 4 * MILLION - 1 - np.arange(512),
    ]).astype(np.int32)[None]
    tables = rope.make_tables(config, head_dim, 4 * MILLION)
    cos, sin = (np.asarray(x, np.float64)[:, :, 0] for x in jax.jit(rope.angles)(tables, positions))
    exact = positions[..., None] * rope.frequencies(config, head_dim)[0]
    turn = np.arctan2(sin, cos) - exact
    error = np.abs(turn - 2 * np.pi * np.round(turn / (2 * np.pi))).max()
    assert error < 5e-7
    # the usual way is wrong by 0.1 rad out there; this is what the tables are for
    usual = positions.astype(np.float32)[..., None] * np.float32(rope.frequencies(config, head_dim)[0])
    assert np.abs(usual - exact).max() > 0.05


def test_angles_carry_the_attention_factor_and_refuse_outside_positions():
    config = rope.RopeConfig(theta=1e4, type='yarn', factor=4.0, original_max_position=64)
    tables = rope.make_tables(config, 32, 256)
    cos, sin = rope.angles(tables, jnp.array([[0, 255]]))
    np.testing.assert_allclose(cos[0, 0], 0.1 * math.log(4) + 1, rtol=1e-6)
    np.testing.assert_allclose(cos**2 + sin**2, (0.1 * math.log(4) + 1) ** 2, rtol=1e-6)
    outside = rope.angles(tables, jnp.array([[-1, 4 * MILLION]]))[0]
    assert np.isnan(outside).all()


def test_tables_have_one_shape_up_to_four_million_and_grow_beyond():
    config = rope.RopeConfig(theta=1e4)
    short, long = (rope.make_tables(config, 8, n).hi_cos.shape for n in (16, 4 * MILLION))
    assert short == long == (1024, 4)
    assert rope.make_tables(config, 8, 4 * MILLION + 1).hi_cos.shape == (2048, 4)


def test_angles_and_rotation_are_the_same_on_a_mesh():
    config = rope.RopeConfig(theta=500000.0)
    positions = np.random.default_rng(0).integers(0, MILLION, (4, 8)).astype(np.int32)
    x = np.random.default_rng(1).standard_normal((4, 8, 2, 16)).astype(np.float32)

    def turned(x, tables, positions):
        return rope.rotate(x, rope.angles(tables, positions))

    alone = jax.jit(turned)(x, rope.make_tables(config, 16, MILLION), positions)
    with jax.set_mesh(sharding.make_mesh((2, 1, 2, 2))):
        together = jax.jit(turned)(
            sharding.put(x, sharding.spec('BTNH')), rope.make_tables(config, 16, MILLION),
            sharding.put(positions, sharding.spec('BT')))
        assert jax.typeof(together).sharding.spec == sharding.spec('BTNH')
    np.testing.assert_allclose(together, alone, atol=1e-6)


def test_rotation_is_the_half_split_one_and_depends_on_distance_alone():
    x = np.random.default_rng(0).standard_normal((1, 1, 1, 16)).astype(np.float32)
    tables = rope.make_tables(rope.RopeConfig(theta=1e4), 16, MILLION)

    def turned(position):
        return np.asarray(rope.rotate(x, rope.angles(tables, jnp.array([[position]]))))[0, 0, 0]

    inv_freq = rope.frequencies(rope.RopeConfig(theta=1e4), 16)[0]
    pairs = (x[0, 0, 0, :8] + 1j * x[0, 0, 0, 8:]) * np.exp(1j * 7 * inv_freq)
    np.testing.assert_allclose(turned(7), np.concatenate([pairs.real, pairs.imag]), atol=1e-6)
    near = turned(100) @ turned(3)
    far = turned(900_100) @ turned(900_003)
    assert abs(near - far) < 1e-5
    half = jnp.asarray(x, jnp.bfloat16)
    assert rope.rotate(half, rope.angles(tables, jnp.array([[5]]))).dtype == jnp.bfloat16


@pytest.mark.parametrize(('fields', 'message'), [
    (dict(type='su'), 'default, linear, dynamic, yarn, longrope, llama3'),
    (dict(theta=float('nan')), 'theta'),
    (dict(factor=0.5), 'factor'),
    (dict(factor=8.0), 'does nothing'),
    (dict(type='yarn', factor=4.0), 'original_max_position'),
    (dict(type='dynamic', factor=4.0), 'max_position'),
    (dict(type='llama3', original_max_position=8192, low_freq_factor=4.0), 'low_freq_factor'),
    (dict(type='yarn', original_max_position=64, beta_fast=1.0), 'beta_fast'),
    (dict(type='longrope', original_max_position=64, long_factor=(1.0,)), 'short_factor'),
    (dict(attention_factor=-1.0), 'attention_factor'),
])
def test_bad_configs_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        rope.RopeConfig(**(dict(theta=10000.0) | fields))


def test_longrope_list_of_another_head_dim_is_refused():
    config = rope.RopeConfig(
        theta=1e4, type='longrope', original_max_position=64, long_factor=(1.0,), short_factor=(1.0,))
    with pytest.raises(ValueError, match='head_dim/2'):
        rope.frequencies(config, 16)
