"""From stage to stage: meshes through checkpoints, RoPE scalings, the optimizer's moments, warnings."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pretend
import pytest
import tiny
import tiny_training

from lct.cli.config import load_config, make_run, windowed
from lct.models import llama
from lct.models.llama_sizes import LLAMA3_8B, LLAMA31_8B
from lct.ops import rope
from lct.ops.blockwise_attention import Chunks
from lct.ops.strategies import Attention
from lct.train import loop, optimizer, stages, state, stopping
from lct.train.step import train_step
from lct.train.warnings import stage_warnings
from lct.weights import llama_config

EXPERIMENTS = pathlib.Path(__file__).parents[1] / 'experiments'
MESHES = ((1, 1, 8, 1), (2, 1, 4, 1), (1, 2, 2, 2))
STAGE = stages.Stage(name='one', seq_len=64, num_steps=2, batch_size=2, learning_rate=1e-2,
                     memory=tiny.MEMORY)


@pytest.fixture(scope='module', autouse=True)
def no_benchmark():
    """The peak of the machine, measured at every start, takes longer than these runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, 'measured_peak', lambda dtype: 1e12)
        yield


def train(workdir, run_stages, stop_requested=()):
    run = loop.Run(stages=tuple(run_stages), checkpoint_every=100)
    start = lambda: llama.init(tiny_training.CONFIG, jax.random.key(0))
    loop.train(run, tiny_training.CONFIG, start, tiny_training.mixture(), workdir, stop_requested)


def losses(workdir):
    rows = (workdir / 'metrics' / 'metrics.jsonl').read_text().splitlines()
    return [json.loads(row)['loss'] for row in rows]


def test_hand_over_from_mesh_to_mesh_keeps_the_loss(tmp_path, monkeypatch):
    """Between the first two stages in memory, between the last two through a checkpoint: a run that is
    stopped."""
    staged = [dataclasses.replace(STAGE, name=str(mesh), mesh=mesh) for mesh in MESHES]
    train(tmp_path / 'whole', [dataclasses.replace(stage, mesh=MESHES[0]) for stage in staged])
    stop_requested, original = [], loop.train_step

    def then_stop(train_state, *args):
        if int(train_state.step) == 3:  # the last step of the second stage
            stop_requested.append('SIGTERM')
        return original(train_state, *args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, 'train_step', then_stop)
        with pytest.raises(stopping.Interrupted, match='saved step 4 of 6'):
            train(tmp_path / 'staged', staged, stop_requested)
    train(tmp_path / 'staged', staged)
    one, several = losses(tmp_path / 'whole'), losses(tmp_path / 'staged')
    assert len(one) == len(several) == 6 and one[0] - one[-1] > 0.1  # a constant loss would prove nothing
    for step in (2, 4):  # the first after each hand-over
        assert abs(several[step] - one[step]) < 1e-5
    np.testing.assert_allclose(several, one, atol=1e-4)


def test_moments_are_carried_or_start_anew(tmp_path, monkeypatch):
    momenta = []

    def record(train_state, *args):
        momenta.append(float(train_state.opt_state[1].mu.final_norm[0]))
        return pretend.train_step(train_state, *args)

    monkeypatch.setattr(loop, 'train_step', record)
    train(tmp_path, [STAGE, dataclasses.replace(STAGE, name='two'),
                     dataclasses.replace(STAGE, name='three', carry_optimizer=False)])
    assert momenta == [0, 1, 2, 3, 0, 1]


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_step_leaves_every_dtype_as_it_was(dtype):
    tx = optimizer.make(optimizer.OptimizerConfig())
    before = state.create(llama.init(tiny.CONFIG, jax.random.key(0), jnp.dtype(dtype)), tx)
    batch = {name: jnp.asarray(x)[None] for name, x in tiny.batch(2, 32).items()}
    schedule = optimizer.schedule((STAGE,))
    after, _ = jax.eval_shape(lambda s: train_step(
        s, batch, tiny.tables(), tiny.CONFIG.architecture(), tiny.MEMORY, tx, schedule), before)
    assert jax.tree.map(lambda x: x.dtype, before) == jax.tree.map(lambda x: x.dtype, after)
    wanted = state.abstract(tiny.CONFIG, tx, jnp.dtype(dtype))
    assert jax.tree.map(lambda x: x.dtype, before) == jax.tree.map(lambda x: x.dtype, wanted)
    assert {x.dtype for x in jax.tree.leaves(before.opt_state) if x.ndim} == {jnp.dtype('float32')}


def test_equal_schedules_and_optimizers_are_the_same_object():
    longer = dataclasses.replace(STAGE, seq_len=128)  # another stage of the same rates
    assert optimizer.schedule((STAGE,)) is optimizer.schedule((longer,))
    assert optimizer.make(optimizer.OptimizerConfig()) is optimizer.make(optimizer.OptimizerConfig())


def planned(config, *scalings, seq_len=65536, **more):
    """RopeConfig of stages of twice the length each."""
    curriculum = [
        stages.Stage(name=str(i), seq_len=seq_len << i, num_steps=1, scaling=tuple(scaling.items()), **more)
        for i, scaling in enumerate(scalings)]
    plans = stages.configs(curriculum, config)
    for plan in plans:  # what is exported reads back as what was trained
        exported = llama_config.config_from_json(llama_config.config_to_json(plan))
        ours, theirs = (rope.inverse_frequencies(c, plan.max_position_embeddings) for c in (plan, exported))
        assert np.array_equal(ours[0], theirs[0]) and ours[1] == theirs[1]
    return [plan.rope for plan in plans]


def test_scalings_of_stages_with_what_follows_from_the_length():
    divisors = tuple(1.0 + i for i in range(64))
    yarn, linear, kept, llama3, longrope, default = planned(
        LLAMA3_8B, {'type': 'yarn', 'beta_fast': 16.0}, {'type': 'linear'}, {},
        {'type': 'llama3', 'factor': 8.0},
        {'type': 'longrope', 'long_factor': divisors, 'short_factor': divisors}, {'type': 'default'})
    assert (yarn.type, yarn.factor, yarn.original_max_position, yarn.beta_fast) == ('yarn', 8.0, 8192, 16.0)
    assert (linear.factor, linear.theta) == (16.0, 500000.0)
    assert kept == dataclasses.replace(linear, max_position=262144)
    assert (llama3.factor, llama3.original_max_position) == (8.0, 8192)
    assert (longrope.factor, longrope.long_factor) == (128.0, divisors)
    assert (default.type, default.factor) == ('default', 1.0)


def test_a_model_that_was_scaled_before_is_scaled_from_its_own_beginning():
    (yarn,) = planned(LLAMA31_8B, {'type': 'yarn'}, seq_len=2**20)
    assert (yarn.original_max_position, yarn.factor) == (8192, 128.0)
    (kept,) = planned(LLAMA31_8B, {}, seq_len=2**20, theta=5e6)
    assert (kept.type, kept.factor, kept.theta) == ('llama3', 8.0, 5e6)


@pytest.mark.parametrize('scaling, message', [
    ({'type': 'dynamic'}, "stage 0: scaling type 'dynamic' .*use theta 'dynamic_ntk'"),
    ({'type': 'spiral'}, "stage 0: scaling .* rope type 'spiral' is unknown"),
    ({'type': 'yarn', 'speed': 3}, 'stage 0: scaling .*speed'),
    ({'type': 'longrope', 'long_factor': (1.0,), 'short_factor': (1.0,)}, 'has 1 numbers but head_dim/2 is '
                                                                          '64'),
    ({'factor': 2.0}, "factor 2.0 does nothing in type 'default'"),
])
def test_impossible_scalings_are_refused(scaling, message):
    with pytest.raises(ValueError, match=message):
        planned(LLAMA3_8B, scaling)


def test_a_dynamic_scaling_of_the_base_is_not_dropped():
    scaled = rope.RopeConfig(theta=5e5, type='dynamic', factor=2.0, max_position=8192)
    base = dataclasses.replace(LLAMA3_8B, rope=scaled)
    message = "stage 0: theta 'keep' at 65536 tokens .*type 'dynamic'.*use theta 'dynamic_ntk'"
    with pytest.raises(ValueError, match=message):
        planned(base, {})
    (within,) = planned(base, {}, seq_len=8192)
    assert within == base.rope
    (extended,) = planned(base, {}, theta='dynamic_ntk')
    assert (extended.type, extended.theta, extended.max_position) == ('dynamic', 15296098.0, 65536)


@pytest.mark.parametrize('seq_len, ring, small, better', [
    (2018, 1, 1, 2016), (4098, 1, 3, 4100), (8 * 2018, 8, 1, 8 * 2016), (4096, 1, None, None),
    (1018, 1, None, None), (256000, 8, None, None),
])
def test_a_length_that_divides_into_degenerate_chunks_only_is_warned_of(seq_len, ring, small, better):
    stage = stages.Stage(name='odd', seq_len=seq_len, num_steps=1, mesh=(1, 1, ring, 1), theta=1e9)
    found = [warning for warning in stage_warnings([stage], LLAMA3_8B) if 'chunks' in warning]
    assert found == ([] if small is None else [
        f'stage odd: seq_len {seq_len:,} gives a device {seq_len // ring:,} tokens, which attention can only '
        f'cut into chunks of {small}, and is slow; the nearest length without that is {better:,}'])


def test_small_chunks_by_choice_are_not_warned_of():
    memory = llama.Memory(attention=Attention(chunks=Chunks(8, 16)))
    stage = stages.Stage(name='small chunks', seq_len=4096, num_steps=1, memory=memory, theta=1e9)
    assert stage_warnings([stage], LLAMA3_8B) == []


def test_weights_of_bfloat16_that_hardly_move_are_warned_of():
    stage = stages.Stage(name='one', seq_len=8192, num_steps=1, learning_rate=2e-5)
    (warning,) = stage_warnings([stage], LLAMA3_8B, 'bfloat16')
    assert 'learning rate 2e-05 are rounded away from weights larger than 0.01, which stand still' in warning
    assert 'float32' in warning
    assert stage_warnings([stage], LLAMA3_8B) == []
    moved = jnp.bfloat16(1.01 * 512 * 2e-5)  # what the sentence says
    assert moved - jnp.bfloat16(2e-5) == moved


def test_a_length_that_theta_does_not_support_is_warned_of_with_the_numbers():
    def warnings(**more):
        return stage_warnings([stages.Stage(name='far', seq_len=65536, num_steps=1, **more)], LLAMA3_8B)

    assert warnings(theta='critical_base') == [] == warnings(scaling=(('type', 'yarn'),))
    (warning,) = warnings()
    assert warning == (
        'stage far: seq_len 65,536 is beyond the 8,219 tokens that theta 500,000 (default) supports by the '
        'scaling law of RoPE; it takes a theta of 22,271,460, and to extrapolate further the critical base '
        '22,443,169')
    assert 'beyond the 53,364 tokens' in warnings(theta='dynamic_ntk')[0]  # Gradient's first stage


def test_a_run_may_give_its_model_a_sliding_window():
    config = load_config(EXPERIMENTS / 'configs' / 'smoke.py')
    short = dataclasses.replace(tiny.CONFIG, max_position_embeddings=64)
    assert windowed(short, config) == short
    config.window = 48
    plans = stages.configs(make_run(config).stages, windowed(short, config))
    assert {plan.window for plan in plans} == {48}
    config.window = 0
    with pytest.raises(ValueError, match='window 0 must be an integer of at least 1'):
        windowed(short, config)
