"""Ring attention on virtual devices against the dense oracle: every ring size, layout, head grouping."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import inputs, permutes, relative_error

from lct.data.layout import inverse, permutation
from lct.ops.attention import attention
from lct.ops.blockwise_attention import Chunks, fit
from lct.ops.masks import chunk_classes
from lct.ops.ring_attention import ring_attention
from lct.sharding import make_mesh, spec

LENGTH, HEAD_DIM = 128, 16
LAYOUTS = ('contiguous', 'zigzag', 'striped')
HEADS = {'mha': (4, 4), 'gqa': (4, 2), 'mqa': (4, 1)}


@functools.cache
def case(heads, packed, dtype=jnp.float32):
    return inputs(np.random.default_rng(5), 1, LENGTH, *HEADS[heads], HEAD_DIM, packed, dtype)


@functools.cache
def oracle(heads, packed, dtype=jnp.float32):
    """Output and dq, dk, dv of the dense oracle, in float32 on the same (possibly rounded) inputs."""
    q, k, v, positions, segments, cotangent = case(heads, packed, dtype)
    q, k, v, cotangent = (x.astype(jnp.float32) for x in (q, k, v, cotangent))
    dense = lambda q, k, v: attention(q, k, v, positions, positions, segments, segments)[0]
    out, vjp = jax.vjp(dense, q, k, v)
    return (out, *vjp(cotangent))


@functools.cache
def program(ring_size):
    """Jitted output and gradients of the ring; one compilation per ring size and shapes."""

    def run(q, k, v, positions, segments, cotangent):
        kv, tokens = spec('BTKH'), spec('BT')
        ring = functools.partial(ring_attention, axis_name='sequence', chunks=Chunks(8, 8))
        # heads stay whole: the test varies K, and 'tensor' has size one
        ring = jax.shard_map(ring, in_specs=(spec('BTNH'), kv, kv, tokens, tokens), out_specs=spec('BTNH'))
        out, vjp = jax.vjp(lambda q, k, v: ring(q, k, v, positions, segments), q, k, v)
        return (out, *vjp(cotangent))

    return jax.jit(run)


def run_ring(ring_size, layout, heads, packed, dtype=jnp.float32):
    order = permutation(layout, LENGTH, ring_size)
    mesh = make_mesh((1, 1, ring_size, 1))
    host = [np.asarray(x)[:, order] for x in case(heads, packed, dtype)]
    with jax.set_mesh(mesh):
        args = [jax.device_put(x, jax.NamedSharding(mesh, spec('BTNH'[: x.ndim]))) for x in host]
        return [np.asarray(x.astype(jnp.float32))[:, inverse(order)] for x in program(ring_size)(*args)]


@pytest.mark.parametrize('ring_size', [1, 2, 4, 8])
@pytest.mark.parametrize('heads', HEADS)
def test_ring_equals_dense_for_every_layout_and_packing(ring_size, heads):
    for layout in LAYOUTS:
        for packed in (False, True):
            ours = run_ring(ring_size, layout, heads, packed)
            for name, a, b in zip(('out', 'dq', 'dk', 'dv'), ours, oracle(heads, packed)):
                error = relative_error(a, b)
                assert error < 1e-5, f'{name} {layout} packed={packed}: {error:.1e}'


def test_bf16_error_does_not_grow_with_the_ring():
    errors = {}
    for ring_size in (1, 8):
        ours = run_ring(ring_size, 'zigzag', 'gqa', False, jnp.bfloat16)
        errors[ring_size] = [relative_error(a, b) for a, b in zip(ours, oracle('gqa', False, jnp.bfloat16))]
    for name, one, eight in zip(('out', 'dq', 'dk', 'dv'), errors[1], errors[8]):
        assert one < 1e-2, f'{name}: {one:.1e}'
        assert eight <= 1.1 * one, f'{name}: {eight:.2e} at ring size 8, {one:.2e} at 1'


def test_forward_rotates_the_unrepeated_keys_and_values_in_a_loop_of_ring_size_minus_one():
    mesh = make_mesh((1, 1, 8, 1))
    q, k, v, positions, segments, _ = case('gqa', False, jnp.bfloat16)
    ring = functools.partial(ring_attention, axis_name='sequence', chunks=Chunks(8, 8))
    with jax.set_mesh(mesh):
        kv, tokens = spec('BTKH'), spec('BT')
        ring = jax.shard_map(ring, in_specs=(spec('BTNH'), kv, kv, tokens, tokens), out_specs=spec('BTNH'))
        args = [jax.device_put(x, jax.NamedSharding(mesh, spec('BTNH'[: x.ndim])))
                for x in (q, k, v, positions, segments)]
        jaxpr = jax.make_jaxpr(ring)(*args)
    sent = list(permutes(jaxpr.jaxpr, 1))
    per_rotation = [(aval.shape, aval.dtype) for aval, _ in sent if aval.ndim == 4]
    assert [times for _, times in sent] == [7] * len(sent)
    assert per_rotation == [((1, LENGTH // 8, 2, HEAD_DIM), jnp.bfloat16)] * 2


@pytest.mark.parametrize('ring_size', [2, 4, 8, 32])
def test_zigzag_balances_the_chunks_that_are_computed_and_skips_half(ring_size):
    chunk = fit(256, 64)
    order = permutation('zigzag', 64 * ring_size, ring_size).astype(np.int32)
    blocks = order.reshape(ring_size, 1, 64)
    ones = np.ones((1, 64), np.int32)
    work = [sum(int((chunk_classes(mine, theirs, ones, ones, chunk, chunk) > 0).sum()) for theirs in blocks)
            for mine in blocks]
    assert max(work) == min(work)
    assert sum(work) == ring_size * (2 * ring_size + 1)  # of the 4 * ring_size^2 pairs of half blocks


def test_heads_that_do_not_group_are_refused():
    q, k, v, positions, segments, _ = case('mha', False)
    with pytest.raises(ValueError, match='num_heads 4 is not a multiple of num_kv_heads 3'):
        ring_attention(q, k[:, :, :3], v[:, :, :3], positions, segments, None)
