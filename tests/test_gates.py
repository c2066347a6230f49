"""Gates: a stage ends at its thresholds, a killed run decides the same, a closed gate is reported."""

import dataclasses
import json
import pathlib
import re

import jax
import pretend
import pytest
import tiny
import tiny_training

from lct.models import llama
from lct.train import gates, loop, stages

EXPERIMENTS = pathlib.Path(__file__).parents[1] / 'experiments'

CONFIG = tiny_training.CONFIG
GATE = gates.Gate(every=2, needle=0.5, short_loss_rise=0.1)
FIRST = stages.Stage(
    name='first', seq_len=32, num_steps=6, batch_size=1, learning_rate=1e-3, memory=tiny.MEMORY)
STAGES = (dataclasses.replace(FIRST, gate=GATE), dataclasses.replace(FIRST, name='second', num_steps=3))


@pytest.fixture(scope='module', autouse=True)
def pretended():
    """Steps and the measured peak of the machine cost nothing here: gates do not need them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, 'train_step', pretend.train_step)
        patch.setattr(loop, 'measured_peak', lambda dtype: 1e12)
        yield


class Scores:
    """Stands in for an evaluation: needle scores by step, taken from a list; counts its calls."""

    def __init__(self, *needle, rise=0.0):
        self._needle, self._rise, self.calls = list(needle), rise, 0

    def __call__(self, stage, config, params):
        assert config.max_position_embeddings >= stage.seq_len and params.embed.shape == (258, 32)
        self.calls += 1
        return {'needle': self._needle.pop(0), 'short_loss_rise': self._rise}


def train(workdir, scores, run_stages=STAGES, stop_requested=(), **more):
    run = loop.Run(stages=run_stages, checkpoint_every=100, line_every_s=0, **more)
    start = lambda: llama.init(CONFIG, jax.random.key(0))
    _, params, summary = loop.train(
        run, CONFIG, start, tiny_training.mixture(), workdir, stop_requested, scores)
    return tiny_training.digest(jax.device_get(params)), summary


def steps(workdir):
    rows = (workdir / 'metrics' / 'metrics.jsonl').read_text().splitlines()
    return [json.loads(row)['step'] for row in rows]


@pytest.fixture(scope='module')
def passed(tmp_path_factory):
    """A run whose gate opens at the second evaluation: its folder, digest of the weights and summary."""
    folder, scores = tmp_path_factory.mktemp('passed'), Scores(0.4, 0.5)
    out = train(folder, scores)
    assert scores.calls == 2
    return folder, *out


def test_a_stage_ends_when_its_gate_opens_and_the_next_has_its_own_rate(passed):
    folder, _, summary = passed
    assert steps(folder) == [1, 2, 3, 4, 7, 8, 9]  # the second stage begins at its place in the schedule
    assert summary['stage_steps'] == [4, 3] and summary['steps'] == 7
    short, _ = train(folder.with_name('short'), None, (dataclasses.replace(FIRST, num_steps=4), STAGES[1]))
    assert short == passed[1]  # as if the stage had been as long as it was (its rate is constant)


def test_the_lines_say_why_a_stage_ended(tmp_path, capsys):
    train(tmp_path, Scores(0.4, 0.9))
    out = capsys.readouterr().out
    assert 'gate closed after 2 steps: recall probe 0.40 (at least 0.50), short-context loss +0.000' in out
    assert 'gate open after 4 steps' in out
    assert re.search(r'stage first: done in \S+, gate open after 4 of at most 6 steps', out)
    assert re.search(r'stage second: done in \S+, all 3 steps taken', out)


@pytest.mark.parametrize('rise, needle, opens', [(0.1, 0.5, True), (0.11, 1.0, False), (0.0, 0.49, False),
                                                 (float('nan'), 1.0, False)])
def test_both_thresholds_count(rise, needle, opens):
    assert GATE.opens({'needle': needle, 'short_loss_rise': rise}) == opens


def test_a_run_killed_at_an_evaluation_repeats_it_and_after_it_does_not(passed, tmp_path):
    class Killed(Exception):
        pass

    def kill(*args):
        raise Killed

    with pytest.raises(Killed):  # the checkpoint of step 2 is saved, its scores are not
        train(tmp_path, kill)
    add, scores = gates.GateLog.add, Scores(0.4, 0.5)

    def add_and_kill(self, stage, step, *args):
        if step == 6:  # the scores that opened the gate at step 4 are recorded, the jump's checkpoint is not
            raise Killed
        return add(self, stage, step, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gates.GateLog, 'add', add_and_kill)
        with pytest.raises(Killed):
            train(tmp_path, scores)
    assert scores.calls == 2
    weights, summary = train(tmp_path, Scores())  # an empty list: a third evaluation would fail
    assert (weights, summary['stage_steps']) == (passed[1], [4, 3])
    again, _ = train(tmp_path, Scores())  # a finished run is not trained or evaluated again
    assert again == weights


def test_a_closed_gate_stops_the_run_unless_it_says_advance(tmp_path, capsys):
    closed = ('gate is closed after all 6 steps: recall probe 0.30 .*the steps are saved: '
              'continue with other thresholds')
    with pytest.raises(gates.GateClosed, match=closed):
        train(tmp_path, Scores(0.1, 0.2, 0.3))
    with pytest.raises(gates.GateClosed, match=closed):  # the same command, without an evaluation
        train(tmp_path, Scores())
    advance = dataclasses.replace(STAGES[0], gate=dataclasses.replace(GATE, otherwise='advance'))
    _, summary = train(tmp_path, Scores(), (advance, STAGES[1]))
    assert summary['stage_steps'] == [6, 3] and steps(tmp_path) == list(range(1, 10))
    _, summary = train(tmp_path / 'new', Scores(0.1, 0.2, 0.3), (advance, STAGES[1]))
    assert 'all 6 steps taken, and on although the gate is closed' in capsys.readouterr().out


def test_the_gate_of_the_last_stage_counts_too(tmp_path):
    last = (STAGES[1], dataclasses.replace(STAGES[0], num_steps=2, name='last'))
    with pytest.raises(gates.GateClosed, match='stage last'):
        train(tmp_path, Scores(0.0), last)
    lower = dataclasses.replace(last[1], gate=dataclasses.replace(GATE, needle=0.0))
    assert train(tmp_path, Scores(), (last[0], lower))[1]['stage_steps'] == [3, 2]


@pytest.mark.parametrize('fields, message', [
    ({'every': 0}, 'every 0 must be a positive number of steps'),
    ({'needle': 90}, 'needle 90 is a share'),
    ({'otherwise': 'go'}, "otherwise 'go' must be 'stop' or 'advance'"),
])
def test_impossible_gates_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        gates.Gate(**{'every': 1, **fields})


def test_a_gate_without_an_evaluation_is_refused_before_anything_is_computed(tmp_path):
    with pytest.raises(ValueError, match='no gate_scores to measure it by'):
        train(tmp_path, None)
