"""A cache in 8 bits answers as a float32 cache of the same rounded vectors; no step copies a layer of it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_decode import CONFIG, MEMORY, SEQ_LEN, forward, on, placed_params

from lct import sharding
from lct.data import layout
from lct.models import decode, kv_cache, llama
from lct.models.session import Session
from lct.ops import int8, rope

INT8 = dataclasses.replace(MEMORY, cache_dtype='int8')
TEXTS = [list(range(1, 40)), list(range(20, 31))]
QUESTIONS = [[5, 6, 7], [9, 8, 7, 6, 5]]


def test_vectors_are_off_by_at_most_half_a_scale():
    x = np.random.default_rng(0).standard_normal((5, 7, 16)).astype(np.float32)
    x[0, 0], x[1, 1] = 0, x[1, 1] * 1e-30
    vectors = int8.quantize(x)
    assert vectors.values.dtype == jnp.int8 and vectors.scales.shape == x.shape[:-1]
    error = np.abs(int8.dequantize(vectors) - x).max(-1)
    assert (error <= np.abs(x).max(-1) / 254 * 1.02).all()
    np.testing.assert_array_equal(int8.dequantize(vectors)[0, 0], 0)
    values, scales = int8.factors(vectors)
    np.testing.assert_array_equal(values * scales[..., None], int8.dequantize(vectors))


def step(params, cache, tokens, positions, slots, tables):
    return decode.decode_step(params, CONFIG, cache, tokens, positions, slots, tables)


@jax.jit
def in_float32(cache):
    return cache.replace(k=int8.dequantize(cache.k), v=int8.dequantize(cache.v))


@pytest.mark.parametrize('degrees, name', [(None, 'contiguous'), ((2, 1, 2, 2), 'zigzag')])
def test_a_cache_in_8_bits_answers_as_one_of_the_rounded_vectors(degrees, name, monkeypatch):
    monkeypatch.setattr(kv_cache, 'CPU_TILE', 2 * 2 * 8 * 5)  # 5 slots or 20: the last tile is not whole
    with on(degrees):
        params = placed_params()
        indices = layout.permutation(name, SEQ_LEN, sharding.axis_size('sequence'))
        session = Session(params, CONFIG, 2, SEQ_LEN, indices, INT8)
        session.read(TEXTS)
        expected = [forward((tuple(text),))[0, len(text) - 1] for text in TEXTS]
        np.testing.assert_allclose(session.logits, expected, atol=1e-5)  # attention to itself is not rounded
        rounded = Session(params, CONFIG, 2, SEQ_LEN, indices, MEMORY)
        rounded.read(TEXTS)
        rounded.cache = in_float32(session.cache)
        rows = [sharding.put(x.astype(np.int32), sharding.spec('B')) for x in (
            np.array([7, 8]), session.lengths, session.slots[session.lengths])]
        outputs = [jax.jit(step)(params, one.cache, *rows, one.tables) for one in (session, rounded)]
        np.testing.assert_allclose(outputs[0][1], outputs[1][1], atol=1e-5)
        written = in_float32(outputs[0][0])
        np.testing.assert_allclose(written.k, outputs[1][0].k, atol=0.01)  # the new token is rounded in one
        logits = [one._write_questions(QUESTIONS, np.ones(2, np.int32))[0] for one in (session, rounded)]
        np.testing.assert_allclose(*logits, atol=1e-5)


def test_texts_read_in_chunks_into_8_bits():
    with on((2, 1, 2, 2)):
        session = Session(placed_params(), CONFIG, 2, SEQ_LEN, memory=INT8)
        session.read(TEXTS, 16)
        assert session.cache.k.values.dtype == jnp.int8
        expected = [forward((tuple(text),))[0, len(text) - 1] for text in TEXTS]
        assert 0 < np.abs(np.asarray(session.logits) - expected).max() < 0.02
        answers = session.ask(QUESTIONS, [3, 3], 3)
        assert np.stack(list(session.stream(QUESTIONS, 3))).T.tolist() == answers


@pytest.mark.parametrize(('dtype', 'rows'), [
    ('float32', 1), ('bfloat16', 1), ('int8', 1), ('bfloat16', 3), ('int8', 3)])
def test_a_token_needs_no_copy_of_the_keys_of_a_layer(dtype, rows, monkeypatch):
    monkeypatch.setattr(kv_cache, 'CPU_TILE', 2**12)
    slots = 2**15
    layer = rows * slots * CONFIG.num_kv_heads * CONFIG.head_dim  # numbers
    cache = jax.eval_shape(lambda x: kv_cache.empty_cache(CONFIG, x, dtype),
                           jax.ShapeDtypeStruct((rows, slots), jnp.int32))
    row, tables = np.zeros(rows, np.int32), rope.make_tables(CONFIG.rope, CONFIG.head_dim, slots)
    params = llama.abstract(CONFIG)
    compiled = jax.jit(step, donate_argnums=1).lower(params, cache, row, row, row, tables).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.4 * layer
    if rows > 1:
        return
    chunk = decode.Chunk(*[np.zeros((1, 32), np.int32)] * 4, last=row)
    extend = jax.jit(decode.extend, static_argnames=('config', 'memory'), donate_argnames='cache')
    compiled = extend.lower(params, CONFIG, cache, chunk, np.zeros((1, CONFIG.vocab_size), np.float32),
                            tables, llama.Memory()).compile()
    # A prefill chunk copies keys and values of a layer, but in the dtype of the cache.
    assert compiled.memory_analysis().temp_size_in_bytes < (2 * jnp.dtype(dtype).itemsize + 1) * layer


def test_a_query_reads_a_bfloat16_cache_as_its_numbers():
    rng = np.random.default_rng(5)
    k, v = (rng.standard_normal((2, 3, 2, 40, 8), np.float32) for _ in range(2))
    q, own_k, own_v = (rng.standard_normal((3, n, 8), np.float32) for n in (4, 2, 2))
    tokens, mask = np.zeros((3, 40), np.int32), rng.random((3, 40)) < 0.5
    k, v = (jnp.asarray(x).astype(jnp.bfloat16) for x in (k, v))
    bits, rounded = (kv_cache.KVCache(*(kv_cache.encode(x, dtype) for x in (k, v)), tokens, tokens)
                     for dtype in (None, 'float32'))
    assert kv_cache.dtype_of(bits) == jnp.bfloat16 and kv_cache.dtype_of(rounded) == jnp.float32
    attend = lambda cache: kv_cache.attend_cache(q, own_k, own_v, cache, jnp.int32(1), mask)
    ours, theirs = attend(bits), attend(rounded)
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(int8.dequantize(bits.k).astype(jnp.float32), rounded.k)


def test_bytes_of_a_slot():
    cache = kv_cache.empty_cache(CONFIG, jnp.zeros((3, 10), jnp.int32), 'int8')
    total = sum(x.nbytes for x in jax.tree.leaves((cache.k, cache.v)))
    assert total == 30 * kv_cache.bytes_of(CONFIG, 'int8')
    for head_dim, ratio in ((32, 0.5313), (64, 0.5157), (128, 0.5079)):
        config = dataclasses.replace(CONFIG, head_dim=head_dim)
        got = kv_cache.bytes_of(config, 'int8') / kv_cache.bytes_of(config, 'bfloat16')
        assert got == pytest.approx(ratio, abs=1e-4)
    with pytest.raises(ValueError, match="cache dtype 'int4' is not one of float32, bfloat16, int8"):
        llama.Memory(cache_dtype='int4')
