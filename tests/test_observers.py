"""A profile, trackers and pictures: they show the run and can neither stop nor change it."""

import argparse
import dataclasses
import gzip
import json
import re
import threading
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pretend
import pytest
import tiny
import tiny_training
from test_metrics import events

from lct.cli import observe
from lct.models import llama
from lct.train import loop, optimizer, scope_times, state, step_profile, trackers
from lct.train.metrics import Metrics, write_images
from lct.train.observers import Observers
from lct.train.step import train_step

ABOUT = trackers.About('tiny', 'ab12', None, {'seed': 1})
PNG = bytes.fromhex('89504e470d0a1a0a0000000d49484452') + (640).to_bytes(4, 'big') + (48).to_bytes(4, 'big')


class Recorder:
    """A backend that keeps what it gets; opened: all of them."""

    opened = []

    def __init__(self, about):
        self.about, self.calls = about, []
        self.opened.append(self)

    def scalars(self, step, values):
        self.calls.append((step, values))

    def image(self, step, name, path):
        self.calls.append((step, name, path))

    def close(self):
        self.calls.append('closed')


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setattr(Recorder, 'opened', [])
    monkeypatch.setitem(trackers.BACKENDS, 'wandb', Recorder)
    return Recorder


def train(workdir, observers, stages):
    """tiny_training without its programs."""
    run = dataclasses.replace(tiny_training.run(), stages=tuple(stages))
    return loop.train(run, tiny_training.CONFIG,
                      lambda: llama.init(tiny_training.CONFIG, jax.random.key(0)), tiny_training.mixture(),
                      workdir, observers=observers)[2]


def test_a_run_reaches_its_trackers_and_states_its_tokens(tmp_path, monkeypatch, recorder):
    monkeypatch.setattr(loop, 'train_step', pretend.train_step)
    stages = [dataclasses.replace(stage, mesh=(1, 1, 1, 1)) for stage in tiny_training.run().stages]
    for part, trained in ((stages[:1], 6 * 128), (stages, 6 * 256)):  # the second call continues the first
        tracker, = trackers.open_all(['wandb'], ABOUT, pytest.fail)
        assert train(tmp_path, Observers(trackers=[tracker]), part)['tokens_of_this_call'] == trained
        tracker.close()
    record = json.loads((tmp_path / 'checkpoints' / '12' / 'record' / 'metadata').read_text())
    assert record['tokens'] == 6 * 128 + 6 * 256  # also after a stage that its gate ended early
    rows = [json.loads(line) for line in (tmp_path / 'metrics' / 'metrics.jsonl').open()]
    assert [row['tokens_seen'] for row in rows] == [128 * i for i in range(1, 7)] + [
        768 + 256 * i for i in range(1, 7)]
    assert [row['stage'] for row in rows] == ['short'] * 6 + ['long'] * 6
    assert all(0 < row['host_memory_gib'] < 1000 and row['learning_rate'] > 0 for row in rows)
    assert all(0 < row['step_seconds'] < 60 for row in rows if row['step'] not in (1, 7))
    first, second = recorder.opened
    assert first.about.id == second.about.id and first.calls[-1] == second.calls[-1] == 'closed'
    (step, values), *_ = second.calls
    assert step == 7 and values['stage long/loss'] == values['loss'] and 'stage' not in values
    assert 'stage long/tokens_seen' not in values
    found = [event for path in sorted((tmp_path / 'metrics').glob('events*')) for event in events(path)]
    tags = {event.step: {value.tag for value in event.summary.value} for event in found}
    assert {'stage short/loss', 'loss'} <= tags[6] and 'stage long/loss' not in tags[6]


def test_a_tracker_that_fails_is_warned_of_once(monkeypatch):
    class Broken(Recorder):
        def scalars(self, step, values):
            raise ConnectionError('no\nroute')

    monkeypatch.setitem(trackers.BACKENDS, 'wandb', Broken)
    lines = []
    tracker, = trackers.open_all(['wandb'], ABOUT, lines.append)
    for step in range(5):
        tracker.scalars(step, {'loss': 1.0})
    tracker.close()
    line, = lines
    assert 'no more metrics are sent to wandb (ConnectionError: no route); training goes on' in line


def test_a_tracker_that_does_not_answer_blocks_nothing(monkeypatch, tmp_path):
    class Silent(Recorder):
        def scalars(self, step, values):
            threading.Event().wait()

    monkeypatch.setitem(trackers.BACKENDS, 'wandb', Silent)
    monkeypatch.setattr(trackers, 'CLOSE_S', 0.05)
    monkeypatch.setattr(trackers, 'MOST', 3)
    lines, began = [], time.monotonic()
    tracker, = trackers.open_all(['wandb'], ABOUT, lines.append)
    written = Metrics(tmp_path, 0, trackers=[tracker])
    for step in range(1, 9):
        written.write(step, {'loss': float('nan')})
    written.close()
    tracker.close()
    assert time.monotonic() - began < 5 and 'did not take all metrics' in lines[0]
    assert len((tmp_path / 'metrics.jsonl').read_text().splitlines()) == 8


def test_rows_that_a_slow_tracker_lost_are_warned_of(monkeypatch, recorder):
    goes_on = threading.Event()
    monkeypatch.setattr(Recorder, 'scalars',
                        lambda self, step, values: goes_on.wait() and self.calls.append(step))
    monkeypatch.setattr(trackers, 'MOST', 3)
    lines = []
    tracker, = trackers.open_all(['wandb'], ABOUT, lines.append)
    for step in range(1, 9):
        tracker.scalars(step, {'loss': 1.0})
    goes_on.set()
    tracker.close()
    assert recorder.opened[0].calls[:3] == [1, 2, 3] and recorder.opened[0].calls[-1] == 'closed'
    line, = lines
    assert 'wandb did not take all metrics in time; they are in metrics.jsonl' in line


def test_trackers_get_finite_numbers_alone(recorder):
    tracker, = trackers.open_all(['wandb'], ABOUT, pytest.fail)
    tracker.scalars(1, {'loss': float('nan'), 'grad_norm': float('inf'), 'skipped': 1})
    tracker.close()
    assert recorder.opened[0].calls == [(1, {'skipped': 1}), 'closed']


def test_pictures_are_shown_and_replaced(tmp_path, recorder):
    path = tmp_path / 'needle.png'
    path.write_bytes(PNG)
    tracker, = trackers.open_all(['wandb'], ABOUT, pytest.fail)
    for step in (6, 9):
        write_images(tmp_path / 'metrics', step, {'needle': path}, [tracker])
    tracker.close()
    file, = (tmp_path / 'metrics' / 'evaluation').iterdir()
    value, = events(file)[-1].summary.value
    assert (value.tag, value.image.width, value.image.height) == ('needle', 640, 48)
    assert value.image.encoded_image_string == PNG and events(file)[-1].step == 9
    assert recorder.opened[0].calls == [(6, 'needle', path), (9, 'needle', path), 'closed']


def test_the_steps_asked_for_are_traced(tmp_path):
    lines = []
    profile = step_profile.StepProfile(2, 3, tmp_path, lines.append)

    @jax.jit
    def double(x):
        with jax.named_scope('attention'):
            x = jnp.sin(x) @ x
        with jax.named_scope('ffn'):
            return jnp.cos(x) @ x

    for number in range(1, 6):
        with profile.step(number):
            x = double(jnp.ones((64, 64)))
        profile.taken(number, x)
    trace, = tmp_path.glob('plugins/profile/*/*.trace.json.gz')
    spans = json.loads(gzip.decompress(trace.read_bytes()))['traceEvents']
    steps = {int(span['args']['step_num']) for span in spans if span.get('name') == 'train'}
    assert steps == {2, 3} and len(lines) == 2 and 'wrote a trace' in lines[0]
    rows = [line.split() for line in (tmp_path / 'scopes.txt').read_text().splitlines()[2:]]
    assert {'attention', 'ffn'} <= {row[0] for row in rows} <= {'attention', 'ffn', 'other'}
    assert sum(float(row[2].rstrip('%')) for row in rows) == pytest.approx(100, abs=0.3)
    profile = step_profile.StepProfile(1, 9, tmp_path / 'cut', lines.append)
    with profile.step(1):
        pass
    profile.close()  # the run ends before
    assert list(tmp_path.glob('cut/plugins/profile/*/*.xplane.pb'))


def test_the_parts_of_a_step_have_names():
    tx, memory = optimizer.make(optimizer.OptimizerConfig()), tiny.MEMORY
    stage = dataclasses.replace(tiny_training.run().stages[0], mesh=(1, 1, 1, 1))
    train_state = state.create(llama.init(tiny.CONFIG, jax.random.key(0)), tx)
    batch = {name: jnp.asarray(x)[None] for name, x in tiny.batch(2, 32).items()}
    lowered = train_step.lower(train_state, batch, tiny.tables(), tiny.CONFIG.architecture(), memory, tx,
                               optimizer.schedule((stage,)))
    text = lowered.as_text(debug_info=True)
    for scope in ('embedding', 'attention/ring_attention', 'ffn', 'lm_head', 'cross_entropy', 'optimizer'):
        assert re.search(rf'["/(]{scope}[)/]', text), scope


def test_the_time_of_a_loop_is_that_of_what_it_runs():
    names = 'a', 'b', 'c', 'd'
    spans = (0, 100), (10, 30), (40, 50), (45, 5)  # a holds b and c, and c holds d
    events = [SimpleNamespace(start_ns=start, duration_ns=duration, stats=[('hlo_op', name)])
              for name, (start, duration) in zip(names, spans)]
    own = {operation: duration for (_, operation), duration in scope_times._own_times(events)}
    assert own == {'a': 20, 'b': 30, 'c': 45, 'd': 5}
    assert scope_times.scope_of('jit(train_step)/jvp(lm_head)/cross_entropy/exp') == 'cross_entropy'
    assert scope_times.scope_of('transpose(jvp(embedding))/add') == 'embedding'
    assert scope_times.scope_of('jit(f)/my_ffn/add') == 'other'


@pytest.mark.parametrize('flags, message', [
    ({'profile': 'steps=3-2'}, 'is not of the form steps=10-12'),
    ({'profile': '10-12'}, 'is not of the form steps=10-12'),
    ({'track': 'wandb,excel'}, '--track excel is not one of wandb, mlflow, trackio'),
    ({'track': 'mlflow'}, "needs the package mlflow; pip install '.\\[mlflow\\]'"),
])
def test_flags_that_cannot_be_followed_are_refused(flags, message, monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, 'find_spec', lambda name: None if name == 'mlflow' else 1)
    with pytest.raises(ValueError, match=message):
        observe.check(argparse.Namespace(**{'profile': None, 'track': None, **flags}))
    assert step_profile.parse_steps('steps=7') == (7, 7)
