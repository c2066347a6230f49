"""The FFN in chunks: the same values and gradients, and its weights cross the mesh once for all chunks."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from attention_cases import relative_error

from lct import sharding
from lct.models import llama, memory
from lct.models.memory import keep_in_core
from lct.ops.blockwise_ffn import blockwise_ffn

LAYER = {'mlp_norm': 'D', 'w_gate': 'DF', 'w_up': 'DF', 'w_down': 'FD'}


def gradients(mesh, num_chunks):
    """d sum(cos(ffn(x))) by the layer and x [8, 16, D] on a mesh, and the compiled text."""
    size = llama.dims(tiny.CONFIG)
    rng = np.random.default_rng(0)
    draw = lambda letters: rng.normal(size=[size[x] for x in letters]).astype(np.float32) / 4

    def total(layer, x):
        return jnp.cos(llama.ffn(x, layer, tiny.CONFIG, num_chunks)).sum()

    with jax.set_mesh(sharding.make_mesh(mesh)):
        weights = {name: sharding.put(draw(letters), sharding.weight_spec(letters))
                   for name, letters in LAYER.items()}
        layer = llama.Layers(**{name: None for name in ('attn_norm', 'wq', 'wk', 'wv', 'wo')}, **weights)
        x = sharding.put(rng.normal(size=(8, 16, size['D'])).astype(np.float32), sharding.spec('BTD'))
        step = jax.jit(jax.grad(total, (0, 1))).lower(layer, x).compile()
        return jax.device_get(step(layer, x)), step.as_text()


@pytest.fixture(scope='module')
def reference():
    return gradients((1, 1, 1, 1), 1)[0]


@pytest.mark.parametrize(
    ('mesh', 'num_chunks'), [((1, 4, 2, 1), 4), ((2, 1, 2, 2), 2), ((1, 1, 8, 1), 2)], ids=str)
def test_gradients_are_equal_and_weights_cross_the_mesh_once(mesh, num_chunks, reference):
    ours, text = gradients(mesh, num_chunks)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(reference)):
        assert relative_error(a, b) < 1e-6
    moved = re.findall(r'= (.*?) (?:all-gather|all-reduce|reduce-scatter)\(.*op_name="([^"]*)"', text)
    in_loop = [shapes for shapes, name in moved if 'while/body' in name]
    weights = [shapes for shapes in in_loop if re.search(r'\[(32|8|16|4),\d+\]', shapes)]
    assert moved and not weights


def test_chunks_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match='seq_len 16 is not a multiple of ffn_chunks 3'):
        blockwise_ffn(jnp.sin, jnp.ones((1, 16, 4)), 3)


@pytest.mark.parametrize(('num_chunks', 'batch', 'length', 'expected'), [
    (1, 1, 512, 1), (1, 1, 4096, 8), (3, 1, 3072, 6), (1, 4, 1024, 8), (2, 1, 1021 * 2, 2)])
def test_chunks_on_cpus_stay_in_the_cache_of_a_core(num_chunks, batch, length, expected):
    assert keep_in_core(num_chunks, batch, length) == expected


def test_chunks_on_cpus_span_the_ring():
    with jax.set_mesh(sharding.make_mesh((1, 2, 4, 1))):
        assert keep_in_core(1, 2, 8192) == 4


def test_chunks_on_other_devices_are_those_of_the_config(monkeypatch):
    monkeypatch.setattr(memory, 'device', lambda: ('gpu', 'NVIDIA L40S'))
    assert keep_in_core(1, 1, 8192) == 1
