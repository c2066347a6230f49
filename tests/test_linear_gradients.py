"""Gradients of linear layers in bfloat16: their values on meshes, and what accelerators multiply."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lct import sharding
from lct.models import llama
from lct.plan.hlo import Program
from lct.plan.matmuls import flops_by_type

SIZES = {'B': 2, 'T': 16, 'D': 16, 'N': 4, 'K': 2, 'H': 8, 'F': 32}


def arrays(equation, dtype, batch):
    """x, w and a gradient of the result, placed on the current mesh; w is float32, as weights are stored."""
    def draw(key, letters, dtype, spec):
        shape = [batch if letter == 'B' else SIZES[letter] for letter in letters]
        return sharding.put(jax.random.normal(key, shape).astype(dtype), spec(letters))

    inputs, out = equation.split('->')
    x, w = inputs.split(',')
    keys = jax.random.split(jax.random.key(3), 3)
    return (draw(keys[0], x, dtype, sharding.spec), draw(keys[1], w, jnp.float32, sharding.weight_spec),
            draw(keys[2], out, dtype, sharding.spec))


def gradients(equation, x, w, grad):
    return jax.vjp(lambda x, w: sharding.einsum(equation, x, w), x, w)[1](grad)


@pytest.mark.parametrize('degrees', [None, (1, 1, 8, 1), (1, 2, 2, 2)])
@pytest.mark.parametrize('name', llama.LINEARS)
def test_gradients_are_those_of_float32_rounded(name, degrees):
    equation, _ = llama.LINEARS[name]
    batch = 1 if degrees and degrees[1] == 1 else 2
    narrow = arrays(equation, jnp.bfloat16, batch)
    rounded = narrow[1].astype(jnp.bfloat16).astype(jnp.float32)
    wide = [np.asarray(one.astype(jnp.float32)) for one in (narrow[0], rounded, narrow[2])]
    expected = jax.vjp(lambda x, w: jnp.einsum(equation, x, w, precision='highest'), *wide[:2])[1](wide[2])
    found = gradients(equation, *narrow)
    if degrees:
        with jax.set_mesh(sharding.make_mesh(degrees)):
            found = jax.jit(gradients, static_argnums=0)(equation, *arrays(equation, jnp.bfloat16, batch))
    assert [one.dtype for one in found] == [jnp.bfloat16, jnp.float32]
    for one, exact in zip(found, expected, strict=True):
        one, exact = (np.asarray(array, np.float32) for array in (one, exact))
        np.testing.assert_allclose(one, exact, atol=2**-7 * np.abs(exact).max())  # two roundings to bfloat16


@pytest.mark.parametrize('name', llama.LINEARS)
def test_accelerators_multiply_bfloat16_alone(name):
    equation, _ = llama.LINEARS[name]
    traced = jax.jit(gradients, static_argnums=0).trace(equation, *arrays(equation, jnp.bfloat16, 1))
    for platform in 'cuda', 'tpu':
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        operands = re.findall(r'dot_general.*: \((.*)\) ->', text)
        assert len(operands) == 2
        assert all('f32' not in one.replace('bf16', '') for one in operands), operands


def test_flops_of_a_program_are_counted_by_type_and_as_often_as_they_run():
    def steps(x, w):
        return jax.lax.fori_loop(0, 3, lambda _, y: jnp.tanh(y @ w), x)

    program = jax.jit(steps).lower(jnp.ones((8, 16)), jnp.ones((16, 16))).compile()
    assert flops_by_type(Program(program.as_text())) == {'f32 x f32': 3 * 2 * 8 * 16 * 16}
