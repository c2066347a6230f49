"""Recall probe: readers of known score (one looks the answer up, one is mute, one reads the end only)."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest

from lct import sharding
from lct.data.tokenizer import BytesTokenizer
from lct.eval import recall_probe
from lct.eval.recall_probe import Decoding, RecallGrid, RecallResult
from lct.models import llama
from lct.ops.rope import RopeConfig

TOKENIZER = BytesTokenizer()
TEXT = 'the sea was calm and the ship went on, mile after mile. ' * 80
HAYSTACK = np.array(TOKENIZER.encode(TEXT), np.int32)
CONFIG = llama.LlamaConfig(
    vocab_size=TOKENIZER.vocab_size, embed_dim=16, mlp_dim=32, num_layers=1, num_heads=2, num_kv_heads=2,
    head_dim=8, rope=RopeConfig(theta=10000.0),
)
DEPTHS = (0.0, 0.5, 1.0)
GRID = RecallGrid((256, 512, 1536), DEPTHS, samples=2)


def reader(memory_of):
    """A generate that answers from memory_of(prompt text)."""
    calls = []

    def generate(params, config, prompts, max_new_tokens, *, indices, memory, batch_size):
        seq_len = len(indices)
        assert sorted(indices.tolist()) == list(range(seq_len)) and len(prompts) <= batch_size
        assert max(map(len, prompts)) + max_new_tokens - 1 <= seq_len
        calls.append((seq_len, max_new_tokens, batch_size))
        out = np.zeros((len(prompts), max_new_tokens), np.int32)
        for row, prompt in zip(out, prompts, strict=True):
            text = TOKENIZER.decode(prompt)
            key = re.search(r'code: (\w+ \w+)\s*$', text)[1]
            found = re.search(rf'code: {key} (\d+)', memory_of(text))
            ids = TOKENIZER.encode(f'{found[1]}.' if found else 'no idea at all')
            row[:] = (ids + [0] * max_new_tokens)[:max_new_tokens]
        return out

    generate.calls = calls
    return generate


def scored(generate, grid=GRID, progress=None):
    return recall_probe.run(None, CONFIG, TOKENIZER, HAYSTACK, grid, Decoding(generate=generate), progress)


def test_a_reader_that_looks_the_answer_up_is_always_right():
    reports = []
    generate = reader(lambda text: text)
    result = scored(generate, progress=lambda *args: reports.append(args))
    assert result.scores.shape == (3, 3) and (result.scores == 1).all()
    assert recall_probe.cells_right(result) == (9, 9) and recall_probe.cells_right(result, 257, 600) == (3, 3)
    assert len({call[:2] for call in generate.calls}) == 2  # two buckets, two programs
    assert reports[-1] == (18, 18, 1536)
    first = result.records[0]
    assert first['correct'] and re.fullmatch(r'\w+ \w+', first['key'])
    assert first['got'].startswith(first['answer'])
    assert result.samples == GRID.samples


def test_a_mute_reader_is_never_right():
    result = scored(reader(lambda text: ''), dataclasses.replace(GRID, num_distractors=2))
    assert (result.scores == 0).all() and recall_probe.cells_right(result) == (0, 9)


def test_a_reader_of_the_end_is_right_at_the_end_only():
    result = scored(reader(lambda text: text[-len(text) // 3:]))
    np.testing.assert_array_equal(result.scores, [[0] * 3, [0] * 3, [1] * 3])


def test_a_cell_does_not_depend_on_the_rest_of_the_grid():
    whole = scored(reader(lambda text: text))
    one = scored(reader(lambda text: text), RecallGrid((512,), DEPTHS, 1))
    answers = {(r['length'], r['depth'], r['sample']): r['answer'] for r in whole.records}
    assert all(answers[r['length'], r['depth'], r['sample']] == r['answer'] for r in one.records)


def test_exactly_the_digits_count():
    assert recall_probe.is_correct(' 482913.', '482913') and recall_probe.is_correct('482913', '482913')
    assert not recall_probe.is_correct('4829131', '482913') and not recall_probe.is_correct('48291', '482913')
    assert not recall_probe.is_correct('is 482913', '482913')


def test_json_round_trip():
    result = scored(reader(lambda text: text))
    again = RecallResult.from_json(result.to_json())
    np.testing.assert_array_equal(again.scores, result.scores)
    assert again.records == result.records
    assert again.lengths == result.lengths and again.depths == result.depths


def test_cache_lengths_divide_over_the_ring():
    assert recall_probe.cache_len(256, 8, 1024) == 1024
    assert recall_probe.cache_len(8192, 8, 1024) == 8192
    assert recall_probe.cache_len(3000, 4, 1024) == 3072
    assert recall_probe.cache_len(100, 8, 100) == 112
    for length in (128, 200):
        assert recall_probe.cache_len(length, 8, 200, ffn_chunks=4) == 256
    assert recall_probe.cache_len(3000, 8, 1024, ffn_chunks=3) == 3072


def test_batches_are_whole_on_every_replica_and_of_one_length_where_the_angles_need_it():
    calls = []

    def mute(params, config, prompts, max_new_tokens, *, indices, memory, batch_size):
        calls.append((batch_size, {len(prompt) for prompt in prompts}))
        return np.zeros((len(prompts), max_new_tokens), np.int32)

    scaled = dataclasses.replace(CONFIG, rope=RopeConfig(1e4, 'dynamic', factor=2.0, max_position=256))
    for config, lengths_of_a_batch in ((CONFIG, 2), (scaled, 1)):
        calls.clear()
        with jax.set_mesh(sharding.make_mesh((2, 2, 2, 1))):
            recall_probe.run(None, config, TOKENIZER, HAYSTACK, RecallGrid((256, 512), (0.0, 1.0), 1),
                             Decoding(generate=mute, batch_tokens=600))
        assert {rows for rows, _ in calls} == {4}
        assert max(len(lengths) for _, lengths in calls) == lengths_of_a_batch


def test_the_summary_says_where_a_model_reads():
    base = np.zeros((5, 7))
    base[:, :3] = 1
    base[0, 6] = 0.75
    lengths, depths = (128, 256, 512, 1024, 2048, 4096, 8192), (0.0, 0.25, 0.5, 0.75, 1.0)
    got = recall_probe.summary(RecallResult(lengths, depths, base, ()), 512)
    assert got['inside'] == [15, 15] and got['beyond'] == [0, 15] and got['worst_length'] == 1024
    assert got['reads_inside'] and got['blind_beyond'] and not got['reads_everywhere']
    assert json.loads(json.dumps(got)) == got
    extended = np.ones((5, 7))
    extended[0, 4] = 0.5
    got = recall_probe.summary(RecallResult(lengths, depths, extended, ()), 512)
    assert got['worst_length'] == 2048 and got['worst_mean'] == 0.9 and got['reads_everywhere']
    assert got['beyond'] == [14, 15] and not got['blind_beyond']
    assert recall_probe.summary(RecallResult(lengths, depths, extended, ()), 8192)['blind_beyond'] is None


def test_errors_name_the_remedy():
    with pytest.raises(ValueError, match='more text or lengths up to'):
        recall_probe.run(None, CONFIG, TOKENIZER, HAYSTACK, RecallGrid((10**6,), DEPTHS, 1))
    with pytest.raises(ValueError, match='at least one of each'):
        RecallGrid((), DEPTHS, 1)
    with pytest.raises(ValueError, match=r'must lie in 0\.\.1'):
        RecallGrid((128,), (0, 50), 1)


def test_a_model_runs_on_a_mesh():
    with jax.set_mesh(sharding.make_mesh((1, 1, 8, 1))):
        params = llama.init(CONFIG, jax.random.key(0))
        decoding = Decoding(memory=llama.Memory(ffn_chunks=4))
        grid = RecallGrid((128, 200), (0.0, 1.0), 1)
        result = recall_probe.run(params, CONFIG, TOKENIZER, HAYSTACK, grid, decoding)
    assert result.scores.shape == (2, 2) and len(result.records) == 4
