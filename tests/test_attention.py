"""The dense oracle against a float64 loop in numpy, and blockwise attention against the dense oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import inputs, relative_error

from lct.ops import masks
from lct.ops.attention import attention
from lct.ops.blockwise_attention import (
    MASK_VALUE,
    Chunks,
    KVBlock,
    QueryBlock,
    attend,
    init_accumulator,
    merge,
)
from lct.ops.context_parallel import AttentionOptions
from lct.ops.masks import Tokens
from lct.ops.ring_attention import ring_attention


def test_the_mask_is_the_literal_matrix_of_two_packed_documents_and_padding():
    tokens = Tokens(jnp.array([0, 1, 0, 1, 0]), jnp.array([1, 1, 2, 2, 0]))
    expected = np.array(
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 0]], bool
    )
    np.testing.assert_array_equal(masks.attention_mask(tokens, tokens), expected)


@pytest.mark.parametrize('packed', [False, True])
def test_chunk_classes_never_contradict_the_mask(packed):
    rng = np.random.default_rng(0)
    for _ in range(20):
        _, _, _, positions, segments, _ = inputs(rng, 2, 32, 1, 1, 2, packed)
        order = rng.permutation(32) if packed else np.arange(32)
        tokens = Tokens(positions[:, order], segments[:, order])
        mask = np.asarray(masks.attention_mask(tokens, tokens))
        kinds = np.asarray(masks.chunk_classes(tokens, tokens, 8, 4))
        for b in range(2):
            for i in range(4):
                for j in range(8):
                    tile = mask[b, 8 * i : 8 * i + 8, 4 * j : 4 * j + 4]
                    if kinds[b, i, j] == masks.EMPTY:
                        assert not tile.any()
                    if kinds[b, i, j] == masks.FULL:
                        assert tile.all()


def test_a_single_document_builds_no_mask_off_the_diagonal():
    positions = jnp.arange(32)[None]
    tokens = Tokens(positions, jnp.ones_like(positions))
    kinds = masks.chunk_classes(tokens, tokens, 8, 8)
    expected = np.tril(np.full((4, 4), masks.FULL)) - np.eye(4, dtype=int) * (masks.FULL - masks.MIXED)
    np.testing.assert_array_equal(kinds[0], expected)


def test_dense_oracle_equals_a_float64_loop():
    rng = np.random.default_rng(1)
    q, k, v, positions, segments, _ = inputs(rng, 1, 12, 4, 2, 8, packed=True)
    segments = segments.at[:, -2:].set(0)
    tokens = Tokens(positions, segments)
    out, lse = attention(q, k, v, tokens, tokens)
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    for t in range(12):
        for n in range(4):
            keys = [s for s in range(12) if segments[0, s] == segments[0, t] != 0
                    and positions[0, s] <= positions[0, t]]
            if not keys:
                assert (out[0, t, n] == 0).all() and lse[0, t, n] == -np.inf
                continue
            scores = np.array([q[0, t, n] @ k[0, s, n // 2] for s in keys]) / 8**0.5
            weights = np.exp(scores - scores.max())
            expected = weights @ v[0, keys, n // 2] / weights.sum()
            np.testing.assert_allclose(out[0, t, n], expected, atol=2e-6)
            np.testing.assert_allclose(lse[0, t, n], np.log(np.exp(scores).sum()), atol=2e-6)


def dense(q, k, v, positions, segments, cotangent):
    tokens = Tokens(positions, segments)
    return jnp.vdot(attention(q, k, v, tokens, tokens)[0], cotangent)


def blockwise(q, k, v, positions, segments, cotangent):
    options = AttentionOptions(Chunks(query=16, key=12))
    return jnp.vdot(ring_attention(q, k, v, positions, segments, None, options), cotangent)


dense, blockwise = (jax.jit(jax.value_and_grad(function, (0, 1, 2))) for function in (dense, blockwise))


@pytest.mark.parametrize('heads', [(4, 4), (4, 2), (4, 1)], ids=['mha', 'gqa', 'mqa'])
@pytest.mark.parametrize('packed', [False, True], ids=['one document', 'packed'])
def test_blockwise_equals_dense_in_values_and_gradients(heads, packed):
    arguments = inputs(np.random.default_rng(2), 2, 48, *heads, 16, packed)
    (value, gradients), (expected, expected_gradients) = blockwise(*arguments), dense(*arguments)
    for ours, theirs in zip(gradients, expected_gradients):
        assert relative_error(ours, theirs) < 1e-5
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_merging_two_blocks_equals_attending_to_both():
    rng = np.random.default_rng(3)
    q, k, v, positions, segments, _ = inputs(rng, 1, 32, 2, 1, 8, packed=False)
    grouped = q[:, :, None]  # one key/value head
    tokens = Tokens(positions, segments)

    def partial_result(keys):
        own_tokens = Tokens(*(x[:, keys] for x in tokens))
        block = KVBlock.create(*(x[:, keys].swapaxes(1, 2) for x in (k, v)), own_tokens)
        return attend(init_accumulator(grouped), QueryBlock(grouped, tokens), block, Chunks(8, 8))

    first, second = partial_result(slice(0, 16)), partial_result(slice(16, 32))
    out, lse = (x[:, :, 0] for x in merge(first, second))
    expected, expected_lse = attention(q, k, v, tokens, tokens)
    assert relative_error(out, expected) < 1e-6
    np.testing.assert_allclose(lse, expected_lse, atol=1e-5)
    assert (second[1][:, :16] == MASK_VALUE).all()  # the first half attends to no key of the second


def test_padding_rows_are_zero_with_zero_gradients():
    rng = np.random.default_rng(4)
    q, k, v, positions, segments, cotangent = inputs(rng, 1, 32, 2, 1, 8, packed=False)
    segments = segments.at[:, 20:].set(0)

    options = AttentionOptions(Chunks(8, 8))

    def loss(q, k, v):
        return jnp.vdot(ring_attention(q, k, v, positions, segments, None, options), cotangent)

    out = ring_attention(q, k, v, positions, segments, None, options)
    assert (out[:, 20:] == 0).all() and np.isfinite(out).all()
    for grad in jax.grad(loss, (0, 1, 2))(q, k, v):
        assert (grad[:, 20:] == 0).all() and np.isfinite(grad).all() and (grad[:, :20] != 0).any()
