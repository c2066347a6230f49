"""The fields of configs: any of them can be set, typos are answered with the nearest names, all at once."""

import dataclasses
import pathlib

import pytest

from lct.cli import fields
from lct.cli.config import (
    as_plain,
    fill_defaults,
    load_config,
    make_run,
    parse_args,
    print_config,
    set_field,
    set_meshes,
)
from lct.models.lora import Adapter
from lct.train import changes
from lct.train.optimizer import OptimizerConfig

CONFIGS = pathlib.Path(__file__).parents[1] / 'experiments' / 'configs'


@pytest.fixture
def config():
    return load_config(CONFIGS / 'laptop.py')


def test_every_field_of_the_dataclasses_can_be_set(config):
    """Each to its own default or to a value of its type, then the run is made from all of them."""
    for name, field in fields.known().items():
        if name.startswith(('base.', 'model.', 'search.')) or name.endswith('.*') or 'gate' in name:
            continue
        if field.default not in (fields.REQUIRED, None, ()) and 'scaling' not in name:
            set_field(config, f'{name}={fields.as_text(field.default)}')
    run = make_run(config)
    assert run.adapter == Adapter() and run.stages[0].theta == 'keep' and run.stages[1].seq_len == 8192
    assert list(fields.problems(as_plain(config))) == []


@pytest.mark.parametrize('override, read, value', [
    ('stages.*.theta=2e6', lambda run: run.stages[0].theta, 2e6),
    ('stages.1.theta=critical_base', lambda run: run.stages[1].theta, 'critical_base'),
    ('stages.1.seq_len=16K', lambda run: run.stages[1].seq_len, 16384),
    ('stages.0.memory.kernel=triton', lambda run: run.stages[0].memory.attention.kernel, 'triton'),
    ('stages.0.memory.strategy=all_gather',
     lambda run: run.stages[0].memory.attention.strategy, 'all_gather'),
    ('stages.0.scaling.type=yarn', lambda run: run.stages[0].scaling, (('type', 'yarn'),)),
    ('stages.0.mixture.books=0.5', lambda run: dict(run.stages[0].mixture)['books'], 0.5),
    ('stages.0.gate.every=5', lambda run: run.stages[0].gate.every, 5),
    ('adapter.also_train=final_norm', lambda run: run.adapter.also_train, ('final_norm',)),
    ('line_every_s=1', lambda run: run.line_every_s, 1.0),
    ('adapter=none', lambda run: run.adapter, None),
    ('optimizer=none', lambda run: run.optimizer, OptimizerConfig()),
    ('stages.0.mesh=1,2,4,1', lambda run: run.stages[0].mesh, (1, 2, 4, 1)),
])
def test_a_field_that_the_file_does_not_spell_or_of_two_types(config, override, read, value):
    if 'mesh' in override:
        set_field(config, 'stages.0.batch_size=4')
    set_field(config, override)
    assert read(make_run(config)) == value


@pytest.mark.parametrize('override, sentence', [
    ('stages.0.thata=1', 'no field stages.0.thata; nearest are stages.0.theta'),
    ('learning_rate=1', 'nearest are stages.0.learning_rate'),
    ('needles.samples=1', 'nearest are needle.samples'),
    ('stages.7.theta=1', 'its stages are 0 to 1'),
    ('stages.0.memory=full', 'cannot be set as a whole, as it is a group of remat'),
    ('stages.0=none', 'cannot be set as a whole, as it is a group of name, seq_len'),
    ('stages=none', 'memory, mixture, published'),
    ('stages.0.seq_len=8Q', "stages.0.seq_len is 2048, and '8Q' is not a whole number"),
    ('held_out=some', "held_out is 0.1, and 'some' is not a number"),
    ('seed', 'not of the form KEY=VALUE'),
])
def test_what_cannot_be_set_is_refused_with_its_remedy(config, override, sentence):
    with pytest.raises(ValueError, match='--set ' + override.replace('*', r'\*')) as error:
        set_field(config, override)
    assert sentence in str(error.value)


def test_typos_of_a_config_file_are_reported_at_once(tmp_path, monkeypatch):
    path = tmp_path / 'mine.py'
    path.write_text(f'''
from lct.cli.config import load_config
def get_config():
    config = load_config({str(CONFIGS / "laptop.py")!r})
    config.modle_folder = 'x'
    del config.stages[0].num_steps
    config.stages[1].memory.remats = 'full'
    with config.ignore_type():
        config.corpus_bytes = '12MB'
    return config
''')
    monkeypatch.setattr('sys.argv', ['extend.py', '--config', str(path), '--set', 'seed=x'])
    with pytest.raises(ValueError) as error:
        parse_args('', path, 'runs')
    text = str(error.value)
    for part in ('5 problems', 'modle_folder, which nothing reads; nearest are model_folder',
                 'stages.1.memory.remats, which nothing reads; nearest are stages.1.memory.remat',
                 "config.corpus_bytes '12MB' is not a whole number or none", "'x' is not a whole number",
                 'config.stages.0 lacks the field num_steps'):
        assert part in text


@pytest.mark.parametrize('text, sentence', [
    ('def get_config(:', 'line 1: .*; correct the file'),
    ('def get_config():\n    return confg', "line 2: name 'confg' is not defined"),
    ('x = 1', 'is not a config'),
])
def test_a_config_file_that_does_not_run_is_named_with_its_line(tmp_path, text, sentence):
    (tmp_path / 'mine.py').write_text(text)
    with pytest.raises(ValueError, match=f'mine.py .*{sentence}|mine.py {sentence}'):
        load_config(tmp_path / 'mine.py')


def test_the_printed_config_sets_itself(config, capsys):
    print_config(config)
    lines = [line.removesuffix('  (default)') for line in capsys.readouterr().out.splitlines()]
    again, before = load_config(CONFIGS / 'smoke.py'), make_run(config)
    for line in lines:
        set_field(again, line)
    assert make_run(again) == before and 'stages.1.memory.kernel=auto' in lines


def test_fields_that_the_file_does_not_spell_get_the_documented_defaults(config):
    del config.seed, config.held_out, config.loss, config.needle.samples
    with config.ignore_type():
        config.name = 'mine'
    fill_defaults(config)
    assert (config.name, config.seed, config.held_out) == ('mine', 0, 0.1)
    assert config.loss.to_dict() == dataclasses.asdict(fields.Loss()) and config.needle.samples == 2
    assert config.needle.lengths == load_config(CONFIGS / 'laptop.py').needle.lengths


def test_an_automatic_mesh_is_one_ring(config):
    set_field(config, 'stages.*.mesh=2,1,2,2')
    set_meshes(config, 'auto')
    assert [stage.mesh for stage in config.stages] == [(1, 1, 8, 1)] * 2 and config.fit_ring


def test_every_field_may_or_may_not_change_when_a_run_continues():
    paths = [name.replace('published.*', 'published.minutes') for name in fields.known()]
    assert [path for path in paths
            if not changes.listed(path.split('.'), changes.MAY_CHANGE + changes.MAY_NOT)] == []
