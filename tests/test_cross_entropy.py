"""The chunked loss against the dense formula in float64, on every kind of mesh, and what it computes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import relative_error

from lct import sharding
from lct.ops.cross_entropy import cross_entropy, cross_entropy_sum

B, T, D, V = 8, 16, 32, 64
CHUNK = 8
SCALE = 0.25  # of the loss: the cotangent that the backward multiplies by
NO_MESH = None
MESHES = [NO_MESH, (1, 1, 1, 1), (1, 1, 8, 1), (2, 2, 2, 1), (1, 1, 4, 2), (1, 2, 2, 2), (1, 1, 1, 8)]


def inputs(dtype=np.float32):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(B, T, D)).astype(np.float32)
    head = rng.normal(size=(D, V)).astype(np.float32)
    targets = rng.integers(0, V, (B, T)).astype(np.int32)
    mask = (rng.random((B, T)) < 0.7) * rng.random((B, T))
    return jnp.asarray(x, dtype), jnp.asarray(head, dtype), targets, mask.astype(np.float32)


def oracle(x, head, targets, mask):
    """Per-token losses, dx and dhead of their sum, from the softmax formula in float64."""
    x, head, mask = (np.asarray(a, np.float64) for a in (x, head, mask))
    logits = x @ head
    log_p = logits - np.logaddexp.reduce(logits, -1, keepdims=True)
    one_hot = np.eye(V)[targets]
    losses = -mask * (log_p * one_hot).sum(-1)
    dlogits = mask[..., None] * (np.exp(log_p) - one_hot)
    return losses, dlogits @ head.T, np.einsum('BTD,BTV->DV', x, dlogits)


def scaled_sum(x, head, targets, mask, chunk=CHUNK):
    return SCALE * cross_entropy_sum(x, head, targets, mask, chunk)


def on_mesh(mesh, function, *args):
    """function jitted on the arguments, placed as the model places them, and its compiled text."""
    def run(args):
        step = jax.jit(function).lower(*args).compile()
        return step(*args), step.as_text()

    if mesh is NO_MESH:
        return run(args)
    with jax.set_mesh(sharding.make_mesh(mesh)):
        tokens = sharding.spec('BT')
        partitions = sharding.spec('BTD'), sharding.weight_spec('DV'), tokens, tokens
        return run([sharding.put(a, partition) for a, partition in zip(args, partitions)])


@pytest.mark.parametrize('mesh', MESHES, ids=str)
def test_loss_and_gradients_equal_float64_on_every_mesh(mesh):
    args = inputs()
    losses, dx, dhead = oracle(*args)
    (loss, grads), _ = on_mesh(mesh, jax.value_and_grad(scaled_sum, (0, 1)), *args)
    assert abs(loss / SCALE - losses.sum()) < 1e-6 * losses.sum()
    assert relative_error(grads[0] / SCALE, dx) < 1e-6
    assert relative_error(grads[1] / SCALE, dhead) < 1e-6
    if mesh is not NO_MESH:
        partitions = [grad.sharding.spec for grad in grads]
        assert partitions == [sharding.spec('BTD'), sharding.weight_spec('DV')]


@pytest.mark.parametrize('mesh', [NO_MESH, (1, 2, 2, 2)], ids=str)
def test_losses_per_token_and_their_sum_without_gradients(mesh):
    args = inputs()
    losses = oracle(*args)[0]
    each, _ = on_mesh(mesh, lambda *args: cross_entropy(*args, CHUNK), *args)
    total, _ = on_mesh(mesh, lambda *args: cross_entropy_sum(*args, CHUNK), *args)
    assert relative_error(each, losses) < 1e-6 and abs(total - losses.sum()) < 1e-6 * losses.sum()


def test_bfloat16_gradients_are_summed_in_float32():
    """dhead adds up 16 chunks: rounded once it is as near as bfloat16 allows, rounded per chunk it is not."""
    args = inputs(jnp.bfloat16)
    _, dx, dhead = oracle(*args)
    grads = jax.jit(jax.grad(scaled_sum, (0, 1)))(*args)
    assert [grad.dtype for grad in grads] == [jnp.bfloat16] * 2
    assert relative_error(np.float32(grads[0]) / SCALE, dx) < 2.5e-3
    assert relative_error(np.float32(grads[1]) / SCALE, dhead) < 2.5e-3


def products(function):
    """Number of matrix products in the program that jax traced."""
    return str(jax.make_jaxpr(function)(*inputs())).count('dot_general')


def test_three_products_with_gradients_and_one_without():
    assert products(scaled_sum) == 1
    assert products(jax.value_and_grad(scaled_sum, (0, 1))) == 3


def test_no_array_of_all_logits():
    text = str(jax.make_jaxpr(jax.value_and_grad(scaled_sum, (0, 1)))(*inputs()))
    sizes = [np.prod([int(n) for n in shape.split(',')]) for shape in re.findall(r'\w+\[([\d,]+)\]', text)]
    assert max(sizes) == B * T * D < B * T * V


def test_the_gradient_of_the_head_crosses_the_mesh_once():
    """It is scattered over the axes that split the head and summed over its copies, after the loop."""
    args = inputs()
    _, text = on_mesh((2, 2, 2, 1), jax.value_and_grad(scaled_sum, (0, 1)), *args)
    big = [line for line in text.splitlines()
           if re.search(rf'f32\[({D}|{D // 4}),{V}\]\S* (all-reduce|reduce-scatter|all-gather)\(', line)]
    kinds = sorted(re.search(r' (all-reduce|reduce-scatter|all-gather)\(', line)[1] for line in big)
    assert kinds == ['all-gather', 'all-reduce', 'reduce-scatter']
    assert not any('while' in line for line in big)


def test_logits_in_the_tens_of_thousands():
    x, head, targets, mask = inputs()
    args = 1024 * x, head, targets, mask
    losses, dx, dhead = oracle(*args)
    loss, grads = jax.jit(jax.value_and_grad(scaled_sum, (0, 1)))(*args)
    assert losses.max() > 1e4 and relative_error(loss / SCALE, losses.sum()) < 1e-6
    assert relative_error(grads[0] / SCALE, dx) < 1e-4 and relative_error(grads[1] / SCALE, dhead) < 1e-4


@pytest.mark.parametrize('chunk', [1, 7, 128, 1000])
def test_any_chunk_gives_the_same_loss(chunk):
    args = inputs()
    loss = jax.jit(lambda *args: scaled_sum(*args, chunk))(*args)
    assert relative_error(loss, SCALE * oracle(*args)[0].sum()) < 1e-6
