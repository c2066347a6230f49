"""Steps that leave the weights alone: what is skipped, what changes, and what the file says about them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pretend
import pytest
import tiny
import tiny_store
import tiny_training

from lct.data.batches import store_source
from lct.data.batches.loader import Loader
from lct.data.batches.memory_source import MemorySource
from lct.data.batches.store_source import StoreSource
from lct.models import llama
from lct.train import bad_steps, loop, optimizer, spikes, stages, state, stopping
from lct.train.step import train_step

STAGE = stages.Stage(name='only', seq_len=32, num_steps=8, batch_size=2, memory=tiny.MEMORY)
TX = optimizer.make(optimizer.OptimizerConfig(weight_decay=0.1))


# ---------------------------------------------------------------------------------------------------
# The step
# ---------------------------------------------------------------------------------------------------


def one_step(train_state, batch):
    batch = {name: jnp.asarray(x)[None] for name, x in batch.items()}
    return train_step(train_state, batch, tiny.tables(), tiny.CONFIG.architecture(), tiny.MEMORY, TX,
                      optimizer.schedule((STAGE,)))


def held(train_state):
    return tiny_training.digest(jax.device_get((train_state.params, train_state.opt_state)))


def guarded(norms, factor=10.0, window=8):
    train_state = state.create(llama.init(tiny.CONFIG, jax.random.key(0)), TX)
    return train_state.replace(guard=spikes.create(factor, window, norms))


def test_a_step_without_targets_changes_the_step_counter_alone():
    """Momentum and decay would move the weights although nothing was learned."""
    train_state, _ = one_step(guarded([]), tiny.batch(4, 32))
    before, empty = held(train_state), tiny.batch(4, 32)
    norms = spikes.history(train_state.guard)
    empty['loss_mask'][:] = 0
    train_state, metrics = one_step(train_state, empty)
    assert held(train_state) == before and spikes.history(train_state.guard) == norms
    assert int(train_state.step) == 2 and int(metrics['skipped']) == int(metrics['skipped_in_row']) == 0
    assert bad_steps.reason_of(jax.device_get(metrics)) == bad_steps.NO_TARGET
    train_state, metrics = one_step(train_state, tiny.batch(4, 32))
    assert held(train_state) != before and not bad_steps.reason_of(jax.device_get(metrics))


def test_a_spike_is_skipped_and_leaves_the_guard_as_it_was():
    train_state = guarded([1e-4] * 8)
    before, norms = held(train_state), spikes.history(train_state.guard)
    for repeats in (1, 2, 3):
        train_state, metrics = one_step(train_state, tiny.batch(4, 32))
        assert bad_steps.reason_of(jax.device_get(metrics)) == bad_steps.SPIKE
        assert int(metrics['skipped_in_row']) == repeats
    assert held(train_state) == before and spikes.history(train_state.guard) == norms
    bad = tiny.batch(4, 32)
    bad['loss_mask'][0, 3] = np.nan
    train_state, metrics = one_step(train_state, bad)
    assert bad_steps.reason_of(jax.device_get(metrics)) == bad_steps.NOT_FINITE
    assert held(train_state) == before and spikes.history(train_state.guard) == norms


def test_an_ordinary_norm_is_accepted_and_remembered():
    train_state, metrics = one_step(guarded([1.0] * 8), tiny.batch(4, 32))
    assert not bad_steps.reason_of(jax.device_get(metrics)) and int(metrics['skipped']) == 0
    assert spikes.history(train_state.guard) == [1.0] * 7 + [float(metrics['grad_norm'])]


@pytest.mark.parametrize(('norms', 'grad_norm', 'expected'), [
    ([], 1e9, False),  # at step 0
    ([1.0], 1e9, False),  # a quarter of the window is 2
    ([1.0, 1.0], 10.1, True),
    ([1.0, 1.0], 9.9, False),
    ([1.0, 2.0, 300.0], 19.0, False),  # the median, which one outlier does not move
    ([1.0, 2.0, 300.0], 21.0, True),
    ([9.0] * 20 + [1.0] * 8, 11.0, True),  # only the last eight count
])
def test_what_is_a_spike(norms, grad_norm, expected):
    guard = spikes.create(10.0, 8, norms)
    assert bool(spikes.is_spike(guard, jnp.float32(grad_norm))) == expected
    assert spikes.history(spikes.create(10.0, 8, spikes.history(guard))) == norms[-8:]


def test_the_history_of_the_guard_continues_with_its_stage_and_begins_with_each(tmp_path, monkeypatch):
    norms, stop_requested = [], []

    def step(train_state, *args):
        norms.append(spikes.history(train_state.guard))
        guard = spikes.accept(train_state.guard, jnp.float32(len(norms)), jnp.bool_(True))
        stop_requested.extend(['SIGTERM'] * (len(norms) == 2))
        return pretend.train_step(train_state.replace(guard=guard), *args)

    monkeypatch.setattr(loop, 'train_step', step)
    short = dataclasses.replace(STAGE, num_steps=3)
    run = loop.Run(stages=(short, dataclasses.replace(short, name='next')), spike_factor=10.0, spike_window=2)
    arguments = (run, tiny_training.CONFIG, lambda: llama.init(tiny_training.CONFIG, jax.random.key(0)),
                 tiny_training.mixture(), tmp_path)
    with pytest.raises(stopping.Interrupted):
        loop.train(*arguments, stop_requested)
    loop.train(*arguments)
    assert norms == [[], [1], [1, 2], [], [4], [4, 5]]


def test_impossible_guards_are_refused():
    for change, message in (({'spike_factor': 0.5}, 'spike_factor 0.5 must be above 1'),
                            ({'spike_factor': float('nan')}, 'spike_factor nan must be above 1'),
                            ({'spike_window': 0}, 'spike_window 0 must be at least 1')):
        with pytest.raises(ValueError, match=message):
            loop.Run(stages=(STAGE,), **change)


# ---------------------------------------------------------------------------------------------------
# The rows
# ---------------------------------------------------------------------------------------------------


def test_rows_of_documents_in_memory_are_described_as_they_are_made():
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 256, n) for n in rng.integers(0, 90, 12)]
    names = [f'd{i}' for i in range(12)]
    source = MemorySource(documents, tiny_store.BYTES, {'text': 0.6, 'recall': 0.2, 'long': 0.2}, names=names)
    by_name, kinds = dict(zip(names, documents)), set()
    for number in range(40):  # several epochs
        (described,) = source.describe(source.state, 1, 64)
        row, bos = source.next_row(64), source.tokenizer.bos_id
        assert described['row'] == number and described['seed'] == 0
        kinds.add(described['kind'])
        assert ('documents' in described) == (described['kind'] != 'recall')
        at = 0
        for one in described.get('documents', []):
            at += described['kind'] == 'long' and bos is not None  # a bos of the row, not of the document
            ids = [*([] if bos is None else [bos]), *by_name[one['document']]]
            expected = ids[one['start']:one['start'] + one['tokens']]
            assert row['tokens'][at:at + one['tokens']].tolist() == expected
            at += one['tokens']
        assert not described.get('documents') or at == 64
    assert kinds == {'text', 'recall', 'long'}


def test_rows_of_a_store_are_described_as_they_are_made(monkeypatch):
    monkeypatch.setattr(store_source, 'MIN_TOKENS', 2**12)
    store = tiny_store.make_store(count=80)
    source = StoreSource(store, tiny_store.BYTES, {'text': 0.5, 'books': 0.3, 'recall': 0.2})
    for number in range(12):
        (described,) = source.describe(source.state, 1, 256)
        sequence = source.next_sequence(256)
        assert described['row'] == number and described['kind'] in ('text', 'recall')
        assert [(one['document'], one['start'], one['tokens']) for one in described['documents']] == [
            (store.names[d], start, stop - start) for d, start, stop in
            zip(sequence.document, sequence.start, sequence.stop) if d >= 0][:64]


def test_bad_steps_name_their_rows(tmp_path, monkeypatch, capsys):
    """The file names the rows of the bad batches and no others, in strict JSON."""
    batches, original = [], Loader.next

    def sometimes_broken(self):
        batch, cursor = original(self)
        batches.append({name: x.copy() for name, x in batch.items()})
        if len(batches) in (1, 4, 5):
            batch['loss_mask'][:] = 0 if len(batches) == 4 else np.nan
        return batch, cursor

    monkeypatch.setattr(Loader, 'next', sometimes_broken)
    monkeypatch.setattr(loop, 'train_step', pretend.train_step)
    run = loop.Run(stages=(STAGE,))
    loop.train(run, tiny_training.CONFIG, lambda: llama.init(tiny_training.CONFIG, jax.random.key(0)),
               tiny_training.mixture(), tmp_path)
    rows = [json.loads(line, parse_constant=pytest.fail)
            for line in (tmp_path / 'bad_steps.jsonl').read_text().splitlines()]
    assert [(row['step'], row['reason'], row['loss'] == 'nan') for row in rows] == [
        (1, bad_steps.NOT_FINITE, True), (4, bad_steps.NO_TARGET, False), (5, bad_steps.NOT_FINITE, True)]
    source = tiny_training.mixture()
    for row in rows:
        made = batches[row['step'] - 1]
        assert [described['row'] for described in row['rows']] == [2 * row['step'] - 2, 2 * row['step'] - 1]
        for described, tokens in zip(row['rows'], made['tokens'], strict=True):
            ids = [[source.tokenizer.bos_id, *source._documents[one['document']]][
                one['start']:one['start'] + one['tokens']] for one in described['documents']]
            assert sum(ids, []) == tokens.tolist()
    out = capsys.readouterr().out
    assert 'no target, weights unchanged' in out and 'not finite, skipped (2 so far)' in out


def test_the_file_of_bad_steps_is_bounded_and_no_condition_of_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bad_steps, 'MAX_BYTES', 400)
    log, values = bad_steps.BadSteps(tmp_path), {'loss': float('inf'), 'grad_norm': 1.0, 'targets': 3.0}
    for step in range(20):
        log.add(step, bad_steps.NOT_FINITE, values, [])
    assert 100 < log.path.stat().st_size <= 400 and capsys.readouterr().out.count('WARNING') == 1
    missing = bad_steps.BadSteps(tmp_path / 'missing')
    missing.add(1, bad_steps.NOT_FINITE, values, [])
    assert 'no longer takes' in capsys.readouterr().out
