"""Long-context losses against models of known behaviour: a reader with a limited context, and real models."""

import contextlib
import math
import types

import jax
import numpy as np
import pytest
from test_loss_by_position import CONFIG

from lct import sharding
from lct.eval import answers
from lct.eval.loss import by_position, long_context, measure
from lct.models import llama

REACH = 40  # tokens of context that the reader below uses


def reader(windows):
    """Losses of a reader that copies: 0.5 nats for a token among the REACH tokens before it, else 5."""
    out = np.full((len(windows), windows.shape[1] - 1), 5.0, np.float32)
    for row, ids in zip(out, windows, strict=True):
        for p in range(len(row)):
            if ids[p + 1] in ids[max(p + 1 - REACH, 1):p + 1]:
                row[p] = 0.5
    return out


def texts(seq_len=256, period=30):
    """Windows that repeat after `period` tokens, behind the BOS 0."""
    body = 1 + np.arange(seq_len) % period
    return np.tile(np.concatenate([[0], body]), (3, 1)).astype(np.int32)


def test_the_loss_falls_where_the_context_reaches_the_repetition():
    sizes = long_context.context_sizes(256, 16, first=8)
    assert sizes == (8, 16, 32, 64, 128, 240)
    got = long_context.growing_context(reader, texts(), 16, sizes, bos_id=0)
    # Behind 16 tokens and the BOS, the targets 30 tokens after their first use are the last ones alone.
    expected = [5.0, 5.0 - 4.5 * 2 / 16, 0.5, 0.5, 0.5, 0.5]
    np.testing.assert_allclose(got, np.array(expected)[:, None].repeat(3, 1), rtol=1e-6)
    assert long_context.effective_context(sizes, got.mean(1)) == 32
    assert long_context.effective_context((8, 16, 32), [np.nan, np.inf, 2.0]) == 32
    for wrong in (np.nan, np.inf):
        assert long_context.effective_context((8, 16), [2.0, wrong]) is None
    with pytest.raises(ValueError, match='windows of 64 tokens do not hold 16 targets behind 64'):
        long_context.context_sizes(64, 16)


def test_key_tokens_need_the_long_context():
    windows = texts(period=30)
    windows[0, 1:] = 100 + np.arange(256)  # a text that never repeats has none
    full = reader(windows)
    short = long_context.short_context_losses(reader, windows, full, context=16, stride=8, bos_id=0)
    for i, start in ((1, 16), (2, 248)):  # the losses of a forward over those tokens alone
        cut = np.concatenate([windows[i, :1], windows[i, start - 15:start + 9]])[None]
        np.testing.assert_array_equal(short[i, start:start + 8], reader(cut)[0, 16:])
    key = long_context.key_tokens(full, short)
    assert key.sum(1).tolist() == [0, 256 - 30, 256 - 30]
    assert long_context.long_ppl(full, key) == pytest.approx(np.exp(0.5))
    assert np.isnan(long_context.long_ppl(full[:1], key[:1]))
    uneven = long_context.short_context_losses(reader, windows, full, context=16, stride=7, bos_id=0)
    assert (uneven >= full).all() and not (uneven[:, :16] != full[:, :16]).any()
    with pytest.raises(ValueError, match='does not fit into windows of 256'):
        long_context.short_context_losses(reader, windows, full, 200, 100)


def test_borders_lie_between_devices():
    distance = long_context.border_distance('contiguous', 16, 4)
    assert distance.tolist() == [3, 2, 1, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 2, 3]
    zigzag = long_context.border_distance('zigzag', 16, 2)  # stretches of 4: devices 0, 1, 1, 0
    assert zigzag.tolist() == [3, 2, 1, 0, 0, 1, 2, 3, 3, 2, 1, 0, 0, 1, 2, 3]
    losses = np.where(distance == 0, 3.0, 1.0)[None].repeat(2, 0)
    bins = long_context.bin_by_distance(losses, distance)
    assert bins.edges == (0, 1, 2, 4) and bins.mean.tolist() == [3, 1, 1] and bins.num_windows == 2
    for layout, ring_size in (('striped', 4), ('zigzag', 1)):
        with pytest.raises(ValueError, match='use contiguous or zigzag and two devices'):
            long_context.border_distance(layout, 16, ring_size)


def test_a_regression_is_paired():
    got = long_context.regression([2.0, 3.0, 4.0], [1.9, 2.9, 3.9], [0, 1, 2])
    assert got['difference'] == pytest.approx(0.1) and got['stderr'] == pytest.approx(0, abs=1e-12)
    assert got['base'] == pytest.approx(2.9) and got['num_windows'] == 3 and got['documents'] == 3
    assert np.isnan(long_context.regression([2.0, 3.0], [1.0, 1.5], [0, 0])['stderr'])
    rows = [
        {'length': 8, 'window': name, 'document': i, 'meta': {'mean': 2.0}} for i, name in enumerate('abc')
    ]
    assert measure.regression(rows, rows)['difference'] == 0
    for others in (rows[::-1], rows[:2], [*rows[:2], {**rows[2], 'window': 'd'}]):
        with pytest.raises(
            ValueError, match='the model was read on 3 windows and the base model on [23], of which'
        ):
            measure.regression(rows, others)


def test_windows_are_measured_once_and_others_again(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(measure, '_loss', lambda model, windows: read.append(windows[0]) or np.ones(
        (1, windows.shape[1] - 1), np.float32))
    tokenizer, path = types.SimpleNamespace(bos_id=None), tmp_path / 'short.jsonl'
    model = types.SimpleNamespace(memory=llama.Memory(remat='none'), tokenizer=tokenizer)
    documents = [np.arange(1000 * i, 1000 * i + 100).tolist() for i in range(3)]

    def measured(count, seed):
        plan = types.SimpleNamespace(lengths=(64,), counts={64: count}, tokenizer=tokenizer, identity='',
                                     run=0, material=types.SimpleNamespace(seed=seed))
        before = len(read)
        rows, problems = measure.run_short(model, plan, documents, path, 64)
        wanted = by_position.evaluation_windows(documents, 64, count, seed)[0]
        assert [row['window'] for row in rows] == [answers.digest(window) for window in wanted]
        return len(read) - before, problems

    assert measured(4, 0) == (4, []) and measured(4, 0) == (0, [])
    assert measured(6, 0) == (2, [])  # more of them: those that are there stay
    count, (problem,) = measured(5, 1)
    assert count == 5 and 'short.jsonl holds 5 lines of the task short about other windows' in problem
    assert measured(5, 1) == (0, [])
    rows = answers.read(path)[0]
    answers.write(
        path, {key: {name: row[name] for name in row if name != 'window'} for key, row in rows.items()}
    )
    assert measured(5, 1)[0] == 5  # a line without a window is from an earlier version


def test_the_suite_measures_the_same_on_a_mesh(tmp_path):
    params = jax.tree.map(np.asarray, llama.init(CONFIG, jax.random.key(0)))
    documents = [np.random.default_rng(i).integers(0, 32, 700).tolist() for i in range(2)]
    tokenizer = types.SimpleNamespace(bos_id=None)
    plan = types.SimpleNamespace(
        lengths=(256,), counts={256: 2}, tokenizer=tokenizer, identity='', run=0,
        material=types.SimpleNamespace(seed=0))
    found = []
    for degrees in (None, (1, 1, 2, 1)):
        with contextlib.nullcontext() if degrees is None else jax.set_mesh(sharding.make_mesh(degrees)):
            placed = jax.tree.map(sharding.put, params, llama.specs(CONFIG))
            model = types.SimpleNamespace(
                params=placed, config=CONFIG, memory=llama.Memory(remat='none'), tokenizer=tokenizer
            )
            path = tmp_path / f'{degrees}.jsonl'
            rows, problems = measure.run(model, plan, documents, path)
            assert problems == []
            if degrees is None:  # saved windows are not measured again
                again = types.SimpleNamespace(memory=model.memory, tokenizer=tokenizer)
                assert measure.run(again, plan, documents, path)[0] == rows
            found.append(measure.scores(rows))
    one, two = found
    assert 'border' not in one and two['border']['num_windows'] == 2
    assert one['growing']['contexts'] == [64, 128, 240]
    np.testing.assert_equal(one['long_ppl'], two['long_ppl'])
    assert one['documents'] == 2 and all(error > 0 for error in one['stderr'])
    for name in ('mean', 'stderr'):
        np.testing.assert_allclose(one[name], two[name], rtol=1e-4)
        np.testing.assert_allclose(one['growing'][name], two['growing'][name], rtol=1e-4)
    losses = by_position.loss_by_position(
        params, CONFIG, by_position.evaluation_windows(documents, 256, 2, 0)[0], layout='zigzag'
    )
    np.testing.assert_allclose(one['growing']['mean'][-1], losses[:, 240:].mean(), rtol=1e-5)


def test_the_key_tokens_of_an_evaluator_score_another_model(tmp_path, monkeypatch):
    monkeypatch.setattr(long_context, 'ALPHA', 0.0)
    monkeypatch.setattr(long_context, 'BETA', 3.4)  # random models lose about log(32) nats
    documents = [np.random.default_rng(i).integers(0, 32, 300).tolist() for i in range(2)]
    tokenizer = types.SimpleNamespace(bos_id=None)
    plan = types.SimpleNamespace(lengths=(64,), counts={64: 2}, tokenizer=tokenizer, identity='', run=0,
                                 material=types.SimpleNamespace(seed=0))
    scored, evaluator, third = (types.SimpleNamespace(
        params=llama.init(CONFIG, jax.random.key(i)), config=CONFIG, memory=llama.Memory(remat='none'),
        tokenizer=tokenizer) for i in range(3))
    windows = by_position.evaluation_windows(documents, 64, 2, 0)[0]
    loss, full = (by_position.loss_by_position(one.params, CONFIG, windows) for one in (scored, evaluator))
    shorter = long_context.short_context_losses(
        lambda cut: by_position.loss_by_position(evaluator.params, CONFIG, cut), windows, full, 16, 4)
    key = (shorter > full) & (full < 3.4)
    chosen, _ = measure.run_key_tokens(evaluator, plan, documents, tmp_path / 'key.jsonl')
    assert [row['meta']['positions'] for row in chosen] == [np.flatnonzero(row).tolist() for row in key]
    path = tmp_path / 'long_ppl.jsonl'
    rows, _ = measure.run_on_key_tokens(scored, plan, documents, chosen, path)
    got = measure.long_ppl(rows)
    assert got['value'] == pytest.approx(np.exp(loss[key].mean())) and got['key_tokens'] == key.sum() > 5
    # Rows about the key tokens of another evaluator are measured again.
    others, _ = measure.run_key_tokens(third, plan, documents, tmp_path / 'third.jsonl')
    rows, problems = measure.run_on_key_tokens(scored, plan, documents, others, path)
    assert [row['meta']['key'] for row in rows] == [len(row['meta']['positions']) for row in others]
    assert 'measured again' in problems[0]


def test_key_tokens_of_windows_are_pooled():
    rows = [{'length': 64, 'window': str(i), 'document': document, 'meta': {
        'edges': [0, 64], 'means': [2.0], 'short_context': 16, 'key': key, 'key_loss': loss}}
        for i, (document, key, loss) in enumerate([(3, 2, 1.0), (3, 1, 2.0), (5, 3, 6.0), (6, 0, 0.0)])]
    got = measure.scores(rows)['long_ppl']
    assert (got['key_tokens'], got['of'], got['context'], got['documents']) == (6, 256, 16, 2)
    # Documents of 3 key tokens each, 3 and 6 nats in total, which lie 1.5 to either side of the mean.
    assert got['nats'] == 1.5 and got['value'] == pytest.approx(math.exp(1.5))
    assert got['stderr'] == pytest.approx(math.sqrt(2 / 1 * (1.5 ** 2 + 1.5 ** 2)) / 6)


def test_an_equal_bundle_is_not_a_second_one():
    rows = [{'window': window, 'meta': {'edges': [1, 64], 'sums': [total], 'counts': [2]}}
            for window, total in (('a', 3.0), ('a', 3.0), ('b', 5.0))]
    assert np.isnan(measure.identifier_scores(rows[:2])['stderr'][0])
    got = measure.identifier_scores(rows)
    assert got['bundles'] == [2] and got['stderr'][0] > 0 and got['counts'] == [6]
