"""Prefill and decode steps give the logits of the forward pass, on every mesh and layout."""

import contextlib
import dataclasses
import functools

import jax
import numpy as np
import pytest

from lct import sharding
from lct.data import layout
from lct.models import decode, kv_cache, llama, prompt_layout, row_linear
from lct.ops import rope
from lct.ops.blockwise_attention import Chunks
from lct.ops.strategies import Attention

CONFIG = llama.LlamaConfig(
    vocab_size=64, embed_dim=32, mlp_dim=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
    rope=rope.RopeConfig(theta=10000.0),
)
MEMORY = llama.Memory(attention=Attention(chunks=Chunks(8, 8)), ffn_chunks=2)
MESHES = [None, (1, 1, 8, 1), (2, 1, 4, 1), (1, 1, 4, 2), (1, 2, 2, 2)]
SEQ_LEN, NEW = 64, 5
LENGTHS = (50, 3, 17, 60)


def on(degrees):
    return contextlib.nullcontext() if degrees is None else jax.set_mesh(sharding.make_mesh(degrees))


def random_prompts(seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, CONFIG.vocab_size, n).tolist() for n in LENGTHS]


@functools.cache
def host_params():
    return jax.tree.map(np.asarray, llama.init(CONFIG, jax.random.key(0)))


def placed_params():
    return jax.tree.map(sharding.put, host_params(), llama.specs(CONFIG))


@functools.cache
def forward(rows):
    """Logits [T, V] of each row by the plain forward on one device; rows: tuple of tuples of ids."""
    tokens = np.zeros((len(rows), SEQ_LEN), np.int32)
    for out, row in zip(tokens, rows, strict=True):
        out[:len(row)] = row
    with on((1, 1, 1, 1)):  # whatever mesh asks first
        return np.asarray(llama.logits(host_params(), CONFIG, tokens))


@pytest.mark.parametrize('degrees, name', [*((mesh, 'zigzag') for mesh in MESHES), ((1, 1, 4, 2), 'striped')])
def test_prefill_and_teacher_forced_decode_are_the_forward(degrees, name):
    prompts = random_prompts()
    rng = np.random.default_rng(1)
    targets = rng.integers(1, CONFIG.vocab_size, (len(prompts), NEW)).astype(np.int32)
    targets = targets[:, :SEQ_LEN - max(LENGTHS)]
    whole = tuple((*prompt, *more.tolist()) for prompt, more in zip(prompts, targets, strict=True))
    expected = forward(whole)
    with on(degrees):
        params, prefill = placed_params(), jax.jit(decode.prefill, static_argnums=(1, 4))
        tables = rope.make_tables(CONFIG.rope, CONFIG.head_dim, SEQ_LEN)
        indices = layout.permutation(name, SEQ_LEN, sharding.axis_size('sequence'))
        batch = prompt_layout.arrange(prompts, SEQ_LEN, indices)
        cache, got = prefill(params, CONFIG, prompt_layout.place(batch), tables, MEMORY)
        step = jax.jit(decode.decode_step, static_argnums=1, donate_argnums=2)
        positions, rows = batch.last, np.arange(len(prompts))
        np.testing.assert_allclose(got, expected[rows, positions], atol=1e-5)
        for i in range(targets.shape[1]):
            positions = positions + 1
            new = targets[:, i], positions, batch.slot_of[positions]
            new = [sharding.put(x, sharding.spec('B')) for x in new]
            cache, got = step(params, CONFIG, cache, *new, tables)
            np.testing.assert_allclose(got, expected[rows, positions], atol=1e-5)
        filled = np.asarray(cache.segment_ids) > 0
    expected_filled = np.asarray(batch.positions) <= positions[:, None]
    np.testing.assert_array_equal(filled, expected_filled)


@functools.cache
def greedy_tokens():
    """The slow twin: a whole forward per token."""
    prompts = random_prompts()[:3]
    rows = [list(prompt) for prompt in prompts]
    for _ in range(NEW):
        logits = forward(tuple(map(tuple, rows)))
        for row, at in zip(rows, logits, strict=True):
            row.append(int(at[len(row) - 1].argmax()))
    return np.array([row[len(prompt):] for row, prompt in zip(rows, prompts, strict=True)])


@pytest.mark.parametrize('degrees', [None, (1, 1, 8, 1), (2, 1, 2, 2)])
def test_generate_is_greedy_search(degrees):
    prompts = random_prompts()[:3]  # does not divide over data * fsdp: the function pads
    expected = greedy_tokens()
    with on(degrees):
        indices = layout.permutation('zigzag', SEQ_LEN, sharding.axis_size('sequence'))
        run = functools.partial(
            decode.generate, placed_params(), CONFIG, memory=MEMORY, indices=indices, batch_size=2
        )
        np.testing.assert_array_equal(run(prompts, NEW), expected)
        stop = int(expected[0, 1])
        stopped = run(prompts, NEW, stop_id=stop)
    first = expected[0].tolist().index(stop)
    assert (stopped[0, first:] == stop).all()
    np.testing.assert_array_equal(stopped[0, :first], expected[0, :first])


def test_the_cache_never_moves():
    with on((1, 1, 8, 1)):
        # Replicated weights: gathering those that are split over the ring would hide what the cache does.
        params = jax.tree.map(lambda x: sharding.put(x, jax.P()), host_params())
        tables = rope.make_tables(CONFIG.rope, CONFIG.head_dim, SEQ_LEN)
        batch = prompt_layout.arrange(random_prompts()[:2], SEQ_LEN)
        filled = [sharding.put(x, sharding.spec('BS')) for x in (batch.positions, batch.segment_ids)]
        cache = kv_cache.empty_cache(CONFIG, filled[0], np.float32).replace(segment_ids=filled[1])
        row = sharding.put(batch.last, sharding.spec('B'))
        step = jax.jit(decode.decode_step, static_argnums=1)
        program = step.lower(params, CONFIG, cache, row, row, row, tables).compile().as_text()
    for collective in ('all-gather', 'all-to-all', 'collective-permute'):
        assert f'{collective}(' not in program and f'{collective}-start(' not in program
    assert program.count(' all-reduce(') == 2  # one merge per layer, once inside the scan


def test_default_cache_holds_what_is_needed():
    got = decode.generate(host_params(), CONFIG, random_prompts()[:3], 1, memory=MEMORY)
    np.testing.assert_array_equal(got, greedy_tokens()[:, :1])


def test_caches_divide_over_the_ring_and_into_ffn_chunks():
    assert prompt_layout.length_unit(8, 4) == 32 and prompt_layout.length_unit(8, 1) == 16
    assert [prompt_layout.cache_len(length, 8, 4) for length in (128, 200, 1025)] == [128, 256, 2048]
    with on((1, 1, 8, 1)):
        got = decode.generate(
            placed_params(), CONFIG, random_prompts()[:3], 1, memory=llama.Memory(ffn_chunks=3))
    np.testing.assert_array_equal(got, greedy_tokens()[:, :1])


@pytest.mark.parametrize('config', [
    rope.RopeConfig(1e4, 'dynamic', factor=2.0, max_position=40),
    rope.RopeConfig(1e4, 'longrope', factor=4.0, original_max_position=40, long_factor=(4.0, 3.0, 2.0, 1.0),
                    short_factor=(1.0, 1.1, 1.2, 1.3)),
    rope.RopeConfig(1e4, 'linear', factor=2.0),
])
def test_scaling_follows_the_text_and_not_the_cache(config):
    for length in (39, 40, 41, 60):
        frequencies, factor = rope.frequencies(config, 8, length)
        settled = rope.frequencies(prompt_layout.rope_at(config, 8, length), 8, 4096)
        np.testing.assert_array_equal(settled[0], frequencies)
        assert settled[1] == factor


def test_models_before_and_after_extension_share_one_program():
    longer = dataclasses.replace(CONFIG, rope=rope.RopeConfig(theta=1e6), max_position_embeddings=1024)
    prompts = random_prompts()[:2]
    first = decode.generate(host_params(), CONFIG, prompts, 2, indices=np.arange(SEQ_LEN), memory=MEMORY)
    compiled = decode._generate._cache_size()
    second = decode.generate(host_params(), longer, prompts, 2, indices=np.arange(SEQ_LEN), memory=MEMORY)
    assert decode._generate._cache_size() == compiled
    assert first.shape == second.shape == (2, 2)


def test_errors_name_the_remedy():
    with pytest.raises(ValueError, match='use 54 or more'):
        decode.generate(None, CONFIG, [[1] * 50], 5, indices=np.arange(50))
    with pytest.raises(ValueError, match='BOS'):
        decode.generate(None, CONFIG, [[]], 5)
    for wrong in (-1, CONFIG.vocab_size):
        with pytest.raises(ValueError, match=f'token id {wrong} in row 1, column 2 is not in 0..63; use the'):
            decode.generate(None, CONFIG, [[1], [1, 2, wrong]], 5)
    with pytest.raises(ValueError, match='permutation'):
        prompt_layout.arrange([[1, 2]], 4, indices=[0, 0, 1, 2])


def test_biases_and_norms_of_heads_decode_on_every_axis(monkeypatch):
    config = dataclasses.replace(CONFIG, qkv_bias=True, out_bias=True, mlp_bias=True, qk_norm=True,
                                 tie_embeddings=False)
    keys = iter(jax.random.split(jax.random.key(3), 99))
    params = jax.tree.map(lambda x: np.asarray(x + 0.2 * jax.random.normal(next(keys), x.shape)),
                          llama.init(config, jax.random.key(2)))
    prompts = random_prompts()[:2]
    expected = decode.generate(params, config, prompts, NEW, memory=MEMORY)
    with on((1, 2, 2, 2)):
        placed = jax.tree.map(sharding.put, params, llama.specs(config))
        np.testing.assert_array_equal(decode.generate(placed, config, prompts, NEW, memory=MEMORY), expected)
        monkeypatch.setattr(row_linear, 'device', lambda: ('gpu', ''))  # layers stay a stack there
        np.testing.assert_array_equal(
            decode.generate(placed, config, prompts, NEW - 1, memory=MEMORY), expected[:, :-1])
    assert len(set(expected.ravel().tolist())) > 3
