"""Steps, schedules and stages of training."""

import concurrent.futures
import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pretend
import pytest
import tiny
import tiny_training

from lct import sharding
from lct.data.batches.loader import Loader
from lct.models import llama
from lct.models.flops import matmul_params, train_flops
from lct.train import checkpoint, loop, optimizer, stages, state, stopping
from lct.train.metrics import Metrics, Pace
from lct.train.step import loss_and_grads, train_step

STAGE = stages.Stage(name='only', seq_len=32, num_steps=40, batch_size=4, learning_rate=1e-2,
                     mesh=(1, 1, 1, 1), final_fraction=0.5, memory=tiny.MEMORY)
# eps far above float32's rounding of a gradient: it must not decide the direction of a step
ADAMW = optimizer.OptimizerConfig(weight_decay=0.1, clip_norm=0.5, eps=1e-4)
SCHEDULE = optimizer.schedule((STAGE,))


@pytest.fixture(scope='module')
def tx():
    return optimizer.make(ADAMW)


def one_step(tx, train_state, batch):
    batch = {name: jnp.asarray(x)[None] for name, x in batch.items()}
    architecture = tiny.CONFIG.architecture()
    return train_step(train_state, batch, tiny.tables(), architecture, tiny.MEMORY, tx, SCHEDULE)


@pytest.fixture
def pretended(monkeypatch):
    """Steps that compile nothing, for tests of the loop around them."""
    monkeypatch.setattr(loop, 'train_step', pretend.train_step)


def run_tiny(run, workdir, stop_requested=()):
    return loop.train(run, tiny_training.CONFIG, lambda: llama.init(tiny_training.CONFIG, jax.random.key(0)),
                      tiny_training.mixture(), workdir, stop_requested)


def test_the_loss_falls_and_a_bad_step_changes_nothing_but_the_counters(tx):
    train_state = state.create(llama.init(tiny.CONFIG, jax.random.key(0)), tx)
    losses = []
    for _ in range(30):
        train_state, metrics = one_step(tx, train_state, tiny.batch(4, 32))
        losses.append(float(metrics['loss']))
    assert losses[0] > np.log(64) - 0.5 and losses[-1] < 0.3 * losses[0]

    before = tiny_training.digest(jax.device_get((train_state.params, train_state.opt_state)))
    bad = tiny.batch(4, 32)
    bad['loss_mask'][0, 3] = np.nan
    for repeats in (1, 2):
        train_state, metrics = one_step(tx, train_state, bad)
        assert not np.isfinite(metrics['loss'])
        assert (int(metrics['skipped']), int(metrics['skipped_in_row'])) == (repeats, repeats)
    assert tiny_training.digest(jax.device_get((train_state.params, train_state.opt_state))) == before
    train_state, metrics = one_step(tx, train_state, tiny.batch(4, 32))
    assert (int(metrics['skipped']), int(metrics['skipped_in_row'])) == (2, 0)
    assert np.isfinite(metrics['loss']) and int(train_state.step) == 33
    # the learning rate counts all batches, also the two that were skipped
    assert float(metrics['learning_rate']) == pytest.approx(float(SCHEDULE(32)), rel=1e-6)
    assert float(metrics['learning_rate']) < float(SCHEDULE(30))


def test_the_optimizer_is_optax_adamw(tx):
    reference = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(
        SCHEDULE, b1=0.9, b2=0.95, eps=1e-4, weight_decay=0.1, mask=optimizer.decayed,
    ))
    train_state = state.create(llama.init(tiny.CONFIG, jax.random.key(0)), tx)
    params = jax.tree.map(jnp.copy, train_state.params)
    opt_state = reference.init(params)
    batch = {name: jnp.asarray(x)[None] for name, x in tiny.batch(4, 32).items()}

    @jax.jit
    def reference_step(params, opt_state):
        _, grads = loss_and_grads(params, tiny.CONFIG.architecture(), batch, tiny.tables(), tiny.MEMORY)
        updates, opt_state = reference.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for _ in range(3):
        train_state, metrics = one_step(tx, train_state, tiny.batch(4, 32))
        params, opt_state = reference_step(params, opt_state)
        assert metrics['grad_norm'] > 0.5  # so that clipping takes part
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), train_state.params, params)


def test_the_run_stops_with_a_clear_message_after_too_many_bad_steps(tmp_path, monkeypatch, pretended):
    original = Loader.next

    def broken(self):
        batch, cursor = original(self)
        batch['loss_mask'][:] = np.nan
        return batch, cursor

    monkeypatch.setattr(Loader, 'next', broken)
    run = loop.Run(stages=(dataclasses.replace(STAGE, num_steps=8),), max_skips_in_row=3)
    with pytest.raises(FloatingPointError, match='not finite in 3 steps in a row, up to step 3'):
        run_tiny(run, tmp_path)


def test_no_checkpoint_is_from_within_a_row_of_bad_steps(tmp_path, monkeypatch, pretended):
    """Steps 3 to 5 are bad: what is due at step 4 is saved after step 6, a stop there keeps step 2."""
    original, stop_requested, bad = Loader.next, [], {3, 4, 5}

    def broken(self):
        batch, cursor = original(self)
        if cursor['row'] // 4 in bad:
            batch['loss_mask'][:] = np.nan
        if stop_requested is not None and cursor['row'] // 4 == 4:
            stop_requested.append('SIGTERM')
        return batch, cursor

    def saved():
        return sorted(int(path.name) for path in (tmp_path / 'checkpoints').iterdir())

    monkeypatch.setattr(Loader, 'next', broken)
    run = loop.Run(stages=(dataclasses.replace(STAGE, num_steps=8),), max_skips_in_row=4, checkpoint_every=2,
                   keep_checkpoints=9)
    unsaved = (r'after step 4 of 8, not saved \(no checkpoint .* row of bad steps\); '
               'the same command continues after step 2')
    with pytest.raises(stopping.Interrupted, match=unsaved):
        run_tiny(run, tmp_path, stop_requested)
    assert saved() == [2]
    stop_requested = None
    run_tiny(run, tmp_path)
    assert saved() == [2, 6, 8]
    shutil.rmtree(tmp_path / 'checkpoints' / '8')
    bad = {7, 8, 9}
    run_tiny(dataclasses.replace(run, stages=(dataclasses.replace(STAGE, num_steps=9),)), tmp_path)
    assert saved() == [2, 6, 9]  # the end of the run is saved
    bad = {10, 11, 12}  # three more in a row than before the resume, which starts the counter again
    run_tiny(dataclasses.replace(run, stages=(dataclasses.replace(STAGE, num_steps=13),)), tmp_path)


def test_metrics_are_written_for_every_step(tmp_path, capsys, pretended):
    run = loop.Run(stages=(dataclasses.replace(STAGE, num_steps=5),))
    _, _, summary = run_tiny(run, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / 'metrics' / 'metrics.jsonl').read_text().splitlines()]
    assert [row['step'] for row in rows] == [1, 2, 3, 4, 5]
    for name in ('loss', 'grad_norm', 'learning_rate', 'skipped'):
        assert all(np.isfinite(row[name]) for row in rows)
    for name in ('tokens_per_second', 'matmul_peak_fraction'):  # the first step compiles: it has no speed
        assert name not in rows[0] and all(row[name] > 0 for row in rows[1:])
    assert list((tmp_path / 'metrics').glob('events.out.tfevents*'))
    assert 'only | step 5/5 | loss' in capsys.readouterr().out
    _, _, again = run_tiny(run, tmp_path)  # nothing is left to train: the seconds are those of the first time
    assert 0 < again['seconds'] <= summary['seconds'] and again['tokens_of_this_call'] == 0


def test_a_stop_reports_only_what_was_saved(tmp_path, monkeypatch, pretended):
    stop_requested, original = [], Loader.next

    def full(self, step, *args):
        if step == 2:  # found in the background, after save() has returned; nothing of the step remains
            self._wait_for_checkpointers()
            shutil.rmtree(self.directory / '2')
            raise OSError('No space left on device')
        return finalize(self, step, *args)

    def next_then_stop(self):
        batch, cursor = original(self)
        if len(batches) == 1:
            stop_requested.append('SIGTERM')
        batches.append(batch)
        return batch, cursor

    batches, finalize = [], checkpoint.ocp.CheckpointManager._finalize
    monkeypatch.setattr(Loader, 'next', next_then_stop)
    monkeypatch.setattr(checkpoint.ocp.CheckpointManager, '_finalize', full)
    run = loop.Run(stages=(dataclasses.replace(STAGE, num_steps=5),), checkpoint_every=1, keep_checkpoints=1)
    unsaved = (r'stopped after step 2 of 5, not saved \(.*No space left.*\); '
               'the same command continues after step 1')
    with pytest.raises(stopping.Interrupted, match=unsaved):
        run_tiny(run, tmp_path, stop_requested)
    with pytest.raises(stopping.Interrupted, match='saved step 1 of 5'):  # requested before it does anything
        run_tiny(run, tmp_path, stop_requested)
    with pytest.raises(stopping.Interrupted, match='before the first step'):
        run_tiny(run, tmp_path / 'new', stop_requested)


def test_the_pace_is_that_of_the_last_steps():
    pace = Pace()
    assert pace.ended(10, 100.0) is None  # ended at 100 s, most of it compilation
    assert pace.ended(20, 102.0) == (2.0, 10.0)
    for step in range(40):
        measured = pace.ended(20, 103.0 + step)
    assert measured == (1.0, 20.0)


def test_rows_beyond_the_checkpoint_are_dropped_and_flushed_rows_survive(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    first = Metrics(tmp_path, 0)
    for step in (1, 2, 3):
        first.write(step, {'loss': 1.0})
    first.flush()
    assert len(path.read_text().splitlines()) == 3
    with path.open('a') as lines:
        lines.write('{"step": 4, "lo')  # cut short by a kill
    second = Metrics(tmp_path, 2)
    second.write(3, {'loss': 2.0})
    second.close()
    first.close()
    assert [json.loads(row) for row in path.read_text().splitlines()] == [
        {'step': 1, 'loss': 1.0}, {'step': 2, 'loss': 1.0}, {'step': 3, 'loss': 2.0}]


def test_outside_the_main_thread_no_signal_is_caught():
    def catch():
        with stopping.catch_signals() as stop_requested:
            return stop_requested

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert pool.submit(catch).result() == []


def test_schedule_warms_up_decays_and_starts_again_with_the_next_stage():
    first = dataclasses.replace(STAGE, num_steps=10, warmup_steps=2, final_fraction=0.1, learning_rate=1.0)
    rate = optimizer.schedule((first, dataclasses.replace(first, learning_rate=0.5)))
    values = [float(rate(step)) for step in range(20)]
    assert values[0] == 0.5 and values[1] == 1.0 and values[2] == 1.0
    assert values[9] == pytest.approx(0.1, abs=0.05) and values[10] == 0.25 and values[12] == 0.5
    assert all(a >= b for a, b in zip(values[2:9], values[3:10]))


def test_norm_weights_are_not_decayed():
    mask = optimizer.decayed(llama.abstract(tiny.UNTIED))
    assert not mask.final_norm and not mask.layers.attn_norm and not mask.layers.mlp_norm
    assert mask.embed and mask.lm_head and mask.layers.wq and mask.layers.w_down


def test_flops_count_the_visible_pairs_of_packed_documents():
    segments = np.array([[1, 1, 1, 2, 2, 0]])
    positions = np.array([[0, 1, 2, 0, 1, 2]])
    pairs, tokens = 1 + 2 + 3 + 1 + 2, 5
    expected = 6 * matmul_params(tiny.CONFIG) * tokens + 12 * 2 * 4 * 8 * pairs
    counts = Loader.counts(None, {'segment_ids': segments, 'positions': positions})
    assert train_flops(tiny.CONFIG, *counts) == expected
    windowed = Loader.counts(None, {'segment_ids': segments, 'positions': positions}, window=2)
    assert windowed == (5, 1 + 2 + 2 + 1 + 2)
    assert matmul_params(tiny.CONFIG) == llama.num_params(tiny.CONFIG) - 5 * 32
    assert matmul_params(tiny.UNTIED) == matmul_params(tiny.CONFIG)


@pytest.mark.parametrize('change, message', [
    ({'seq_len': 1000, 'mesh': (1, 1, 8, 1)}, r'1000 is not a multiple of .* = 16 .* use 992 or 1008'),
    ({'batch_size': 3, 'mesh': (2, 1, 1, 1)}, r'batch_size 3 is not .* data \* fsdp = 2 \* 1, .* use 2 or 4'),
    ({'layout': 'spiral'}, "layout 'spiral' is not one of"),
    ({'num_steps': 0}, 'must be positive'),
    ({'learning_rate': 0.0}, 'learning_rate 0.0 must be a positive number'),
    ({'learning_rate': float('nan')}, 'learning_rate nan must be a positive number'),
    ({'alpha': 0.0}, 'alpha 0.0 must be a positive number'),
    ({'warmup_steps': -1}, 'warmup_steps -1 must be from 0 to num_steps = 40'),
    ({'warmup_steps': 41}, 'warmup_steps 41 must be from 0 to num_steps = 40'),
    ({'final_fraction': 1.5}, 'final_fraction 1.5 must be from 0 to 1'),
    ({'memory': dataclasses.replace(tiny.MEMORY, ffn_chunks=5)}, '= 1 .* 5; use ffn_chunks 4 or 8'),
])
def test_impossible_stages_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(STAGE, **change)


@pytest.mark.parametrize('change', [
    {'b1': 1.0}, {'b1': -0.1}, {'b2': 1.0}, {'eps': 0.0}, {'weight_decay': -1.0}, {'clip_norm': 0.0},
    {'clip_norm': float('nan')},
])
def test_impossible_optimizers_are_refused(change):
    (field, value), = change.items()
    with pytest.raises(ValueError, match=f'optimizer {field} {value} must be'):
        dataclasses.replace(ADAMW, **change)


@pytest.fixture(scope='module')
def masked_loss():
    """loss_mask [1, 2, 32] -> the loss of one batch, compiled once."""
    batch = {name: jnp.asarray(x)[None] for name, x in tiny.batch(2, 32).items()}
    params = llama.init(tiny.CONFIG, jax.random.key(0))
    return jax.jit(lambda mask: loss_and_grads(
        params, tiny.CONFIG.architecture(), {**batch, 'loss_mask': mask}, tiny.tables(), tiny.MEMORY)[0])


@pytest.mark.parametrize('share', [0.001, 0.25, 0.0])
def test_the_loss_is_a_mean_of_targets_that_count_in_part(share, masked_loss):
    """Also where they count less than one target in total."""
    few = jnp.zeros((1, 2, 32)).at[0, 0, :3].set(1.0)
    np.testing.assert_allclose(masked_loss(share * few), masked_loss(few) if share else 0.0, rtol=1e-5)


def test_stage_configs_follow_their_rules_and_refuse_what_cannot_be():
    def plan(*rules):
        lengths = (128, 512, 2048)
        curriculum = [dataclasses.replace(STAGE, seq_len=n, theta=r) for n, r in zip(lengths, rules)]
        return stages.configs(curriculum, dataclasses.replace(tiny.CONFIG, max_position_embeddings=64))

    configs = plan('keep', 'critical_base', 5e5)
    assert [c.max_position_embeddings for c in configs] == [128, 512, 2048]
    assert configs[0].rope.theta == 1000.0 and configs[2].rope.theta == 5e5
    with pytest.raises(ValueError, match='is not .keep., .dynamic_ntk., .critical_base. or a number'):
        plan('guess')
    with pytest.raises(ValueError, match='seq_len 32 is shorter than the stage before it'):
        stages.configs([dataclasses.replace(STAGE, seq_len=64), STAGE], tiny.CONFIG)


def test_params_move_between_meshes_unchanged(tx):
    with jax.set_mesh(sharding.make_mesh((1, 1, 8, 1))):
        train_state = state.create(llama.init(tiny.CONFIG, jax.random.key(0)), tx)
    before = tiny_training.digest(jax.device_get(train_state))
    with jax.set_mesh(sharding.make_mesh((1, 2, 2, 2))):
        target = state.abstract(tiny.CONFIG, tx, jnp.float32)
        moved = state.move(train_state, target)
        wq = moved.opt_state[1].mu.layers.wq
        assert wq.sharding.spec == sharding.weight_spec('LDNH') and len(wq.sharding.device_set) == 8
    assert tiny_training.digest(jax.device_get(moved)) == before
