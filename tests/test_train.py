"""Steps, schedules and stages of training."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_training

from lct import sharding
from lct.data.loader import Loader
from lct.models import llama
from lct.train import loop, optimizer, stages, state
from lct.train.metrics import matmul_params, step_flops
from lct.train.step import train_step

STAGE = stages.Stage(name='only', seq_len=32, num_steps=40, batch_size=4, learning_rate=1e-2, mesh=(1, 1, 1, 1),
                     memory=tiny.MEMORY)


@pytest.fixture(scope='module')
def tx():
    return optimizer.make(optimizer.OptimizerConfig(), (STAGE,))


def one_step(tx, train_state, batch):
    batch = {name: jnp.asarray(x)[None] for name, x in batch.items()}
    return train_step(train_state, batch, tiny.tables(), tiny.CONFIG.architecture(), tiny.MEMORY, tx)


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


def test_the_run_stops_with_a_clear_message_after_too_many_bad_steps(tmp_path, monkeypatch):
    original = Loader.next

    def broken(self):
        batch, cursor = original(self)
        batch['loss_mask'][:] = np.nan
        return batch, cursor

    monkeypatch.setattr(Loader, 'next', broken)
    run = loop.Run(stages=(dataclasses.replace(STAGE, num_steps=8),), max_skips_in_row=3)
    with pytest.raises(FloatingPointError, match='not finite in 3 steps in a row, up to step 3'):
        loop.train(run, tiny_training.CONFIG, lambda: llama.init(tiny_training.CONFIG, jax.random.key(0)),
                   tiny_training.mixture(), tmp_path)


def test_metrics_are_written_for_every_step(tmp_path, capsys):
    run = loop.Run(stages=(dataclasses.replace(STAGE, num_steps=5),))
    ended = []
    loop.train(run, tiny_training.CONFIG, lambda: llama.init(tiny_training.CONFIG, jax.random.key(0)),
               tiny_training.mixture(), tmp_path, on_stage_end=lambda *args: ended.append(args[0].name))
    rows = [json.loads(line) for line in (tmp_path / 'metrics' / 'metrics.jsonl').read_text().splitlines()]
    assert [row['step'] for row in rows] == [1, 2, 3, 4, 5] and ended == ['only']
    for name in ('loss', 'grad_norm', 'tokens_per_second', 'matmul_peak_fraction', 'skipped'):
        assert all(np.isfinite(row[name]) for row in rows)
    assert list((tmp_path / 'metrics').glob('events.out.tfevents*'))
    assert 'only | step 5/5 | loss' in capsys.readouterr().out


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
    assert step_flops(tiny.CONFIG, {'segment_ids': segments, 'positions': positions}) == expected
    assert matmul_params(tiny.CONFIG) == llama.num_params(tiny.CONFIG) - 5 * 32
    assert matmul_params(tiny.UNTIED) == matmul_params(tiny.CONFIG)


@pytest.mark.parametrize('change, message', [
    ({'seq_len': 1000, 'mesh': (1, 1, 8, 1)}, r'seq_len 1000 is not a multiple of 2 \* ring_size = 16 .* use 1008'),
    ({'batch_size': 3, 'mesh': (2, 1, 1, 1)}, r'batch_size 3 is not a multiple of data \* fsdp = 2 \* 1'),
    ({'layout': 'spiral'}, "layout 'spiral' is not one of"),
    ({'num_steps': 0}, 'must be positive'),
    ({'memory': dataclasses.replace(tiny.MEMORY, ffn_chunks=5)}, 'not a multiple of ring_size'),
])
def test_impossible_stages_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(STAGE, **change)


def test_stage_configs_follow_their_rules_and_refuse_what_cannot_be():
    def plan(*rules):
        lengths = (128, 512, 2048)
        return stages.configs([dataclasses.replace(STAGE, seq_len=n, theta=r) for n, r in zip(lengths, rules)],
                              dataclasses.replace(tiny.CONFIG, max_position_embeddings=64))

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
        wq = moved.opt_state[1][0].mu.layers.wq
        assert wq.sharding.spec == sharding.weight_spec('LDNH') and len(wq.sharding.device_set) == 8
    assert tiny_training.digest(jax.device_get(moved)) == before
