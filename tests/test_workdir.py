"""A work directory belongs to one process and one config, of which the listed fields may change."""

import copy
import dataclasses
import fcntl
import json
import pathlib
import re

import numpy as np
import pytest

from lct import watchdog
from lct.cli import corpus, planned_config
from lct.cli.config import as_plain, load_config
from lct.cli.fields import Base, Settings
from lct.cli.plan_models import resolve
from lct.data import tokenizer as tokenizers
from lct.data.batches.memory_source import MemorySource
from lct.data.batches.upsample import Upsample
from lct.models.config import LlamaConfig
from lct.models.llama import Memory
from lct.models.lora import Adapter
from lct.ops.rope import RopeConfig
from lct.ops.strategies import Attention
from lct.train import changes
from lct.train.gates import Gate
from lct.train.loop import Run
from lct.train.optimizer import OptimizerConfig
from lct.train.stages import Stage
from lct.train.workdir import lock_workdir, recorded_changes

TOKENIZER = tokenizers.load('bytes')
ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = sorted((ROOT / 'experiments' / 'configs').rglob('*.py'))
RECORDS = {  # prefix in a config: (the dataclass, fields that are records of their own)
    '': (Run, {'stages', 'optimizer'}), ' ': (Settings, ()), 'base': (Base, ()),
    'stages.0': (Stage, {'memory'}),
    'stages.0.memory': (Memory, {'attention'}), 'stages.0.memory ': (Attention, {'chunks'}),
    'stages.0.gate': (Gate, ()), 'stages.0.scaling': (RopeConfig, ()), 'optimizer': (OptimizerConfig, ()),
    'adapter': (Adapter, ()), 'model': (LlamaConfig, ()),
}
FURTHER = {f'stages.0.memory.{side}_chunk' for side in ('query', 'key')} | {
    f'upsample.{name}' for name in Upsample._fields} | {
    f'inputs.{name}' for name in ('model.file', 'tokenizer', 'training', 'tokens', 'held_out')} | {
    'inputs.architecture.rope.theta', 'model.rope_theta', 'stages.0.mixture.text'} | {
    f'watchdog.{name}' for name in watchdog.BUDGETS}
SCRIPTS = ('lct/cli/config.py', 'lct/cli/corpus.py', 'experiments/extend.py')
STAGE = {'name': '2K', 'seq_len': 2048, 'num_steps': 70, 'learning_rate': 1e-3, 'mesh': [1, 1, 8, 1],
         'batch_size': 4, 'accumulation': 1, 'theta': 'keep', 'mixture': {'text': 1.0},
         'memory': {'remat': 'none', 'dtype': 'float32'}}
CONFIG = {'name': 'a', 'seed': 0, 'optimizer': {'b1': 0.9}, 'loss': {'windows': 4}, 'checkpoint_every': 10,
          'stages': [STAGE, {**copy.deepcopy(STAGE), 'name': '8K', 'seq_len': 8192, 'num_steps': 90}]}


def fields_of_configs():
    """Paths of all fields of all configs, of all dataclasses, and of what scripts read from a config."""
    fields = {tuple(field.split('.')) for field in FURTHER}
    planned = planned_config.config_fields('x', resolve('llama3-8b'), [dict(STAGE)], {})
    for config in (*(as_plain(load_config(path)) for path in CONFIGS), as_plain(planned)):
        fields |= {change.path for change in changes.differences({'stages': [{}] * 9}, config)}
    for prefix, (record, apart) in RECORDS.items():
        names = {field.name for field in dataclasses.fields(record)} - set(apart)
        fields |= {(*prefix.strip().split('.'), name) if prefix.strip() else (name,) for name in names}
    text = '\n'.join((ROOT / path).read_text() for path in SCRIPTS)
    read = re.findall(r"\bconfig(?:\.get\('(\w+)'|\.([a-z]\w+)\b(?!\())|'(\w+)' in config", text)
    fields |= {(name,) for names in read for name in names if name} - {('json',), ('rope',)}
    return {field for field in fields if not any(other[:len(field)] == field != other for other in fields)}


def test_every_field_of_a_config_is_in_one_of_the_two_lists():
    fields = fields_of_configs()
    assert len(fields) > 150
    for field in fields:
        assert changes.listed(field, changes.MAY_CHANGE) != changes.listed(field, changes.MAY_NOT), (
            f'{".".join(field)} belongs into one list of lct/train/changes.py: may it change on resume?')
    sections = {('stages', '0'), *(('stages', '0', name) for name in ('gate', 'scaling', 'mixture')),
                ('model', 'rope'), ('adapter',), ('upsample',)}
    patterns = (*changes.MAY_CHANGE, *changes.MAY_NOT)
    assert len(set(patterns)) == len(patterns)
    unused = [pattern for pattern in patterns
              if not any(changes.listed(field, [pattern]) for field in fields | sections)]
    assert unused == []


def set_at(config, **values):
    """A copy of a config with fields set, 'stages__1__mesh' for stages.1.mesh; None removes one."""
    config = copy.deepcopy(config)
    for name, value in values.items():
        *parents, last = (int(key) if key.isdigit() else key for key in name.split('__'))
        node = config
        for parent in parents:
            node = node[parent]
        if value is None:
            del node[last]
        else:
            node[last] = value
    return config


def lock(folder, config, step=0, **options):
    (folder / 'checkpoints' / str(step)).mkdir(parents=True, exist_ok=True)
    lock_workdir(folder, config, **{'may_change': True, **options}).close()


PERMITTED = [
    (75, {'stages__1__mesh': [1, 1, 4, 1]}), (75, {'stages__0__mesh': [1, 1, 1, 1]}),
    (75, {'stages__1__memory__remat': 'full'}), (75, {'stages__1__memory__query_chunk': 64}),
    (75, {'name': 'b', 'checkpoint_every': 5, 'loss__windows': 8, 'stages__0__gate': {'every': 5}}),
    (75, {'stages__1__batch_size': 2, 'stages__1__accumulation': 2}),
    (75, {'stages__1__learning_rate': 1e-4}), (75, {'stages__1__num_steps': 20}),
    (160, {'stages__1__num_steps': 120, 'stages__1__learning_rate': 1e-4}),
    (70, {'stages__1__seq_len': 4096, 'stages__1__name': '4K', 'stages__1__theta': 1e6}),
    (70, {'stages__1__mixture': {'long': 1.0}, 'stages__1__batch_size': 8}), (70, {'stages__1': None}),
    (70, {'stages__0__num_steps': 80}), (69, {'stages__0__learning_rate': 1e-4}),
    (0, {'stages__0__theta': 1e6}),
]
REFUSED = [
    (0, {'seed': 1}, 'seed 0 -> 1'), (0, {'optimizer__b1': 0.8}, 'optimizer.b1 0.9 -> 0.8'),
    (0, {'colour': 'red'}, r'colour (absent) -> "red"'),
    (70, {'stages__0__learning_rate': 1e-4}, 'stages.0.learning_rate 0.001 -> 0.0001 (its steps are taken)'),
    (70, {'stages__0__num_steps': 60}, 'stages.0.num_steps 70 -> 60 (its steps are taken)'),
    (71, {'stages__0__num_steps': 80}, 'stages.0.num_steps 70 -> 80 (its steps are taken)'),
    (75, {'stages__1__num_steps': 4}, 'stages.1.num_steps 90 -> 4 (its steps are taken)'),
    (71, {'stages__1__seq_len': 4096}, 'stages.1.seq_len 8192 -> 4096 (the stage has begun)'),
    (71, {'stages__1__batch_size': 8}, 'stages.1.batch_size 4 -> 8 (the stage has begun)'),
    (71, {'stages__1__memory__dtype': 'bfloat16'}, 'stages.1.memory.dtype "float32" -> "bfloat16"'),
    (71, {'stages__1': None}, 'stages.1 "8K" -> (absent) (the stage has begun)'),
]


@pytest.mark.parametrize('step, change', PERMITTED)
def test_what_may_change_is_recorded_and_said(step, change, tmp_path, capsys):
    changed = set_at(CONFIG, **change)
    lock(tmp_path, CONFIG)
    lock(tmp_path, changed, step)
    line, = capsys.readouterr().out.splitlines()
    assert line.startswith(f'config changed after step {step}: ') and line.count(' -> ') == len(
        recorded_changes(tmp_path)) > 0
    recorded = json.loads((tmp_path / 'config.json').read_text())
    recorded.pop('changes')
    assert recorded == changed
    lock(tmp_path, changed, step)  # the same command continues
    assert capsys.readouterr().out == ''


@pytest.mark.parametrize('step, change, message', REFUSED)
def test_what_would_be_another_run_is_refused_by_name(step, change, message, tmp_path):
    lock(tmp_path, CONFIG)
    before = (tmp_path / 'config.json').read_text()
    with pytest.raises(ValueError, match=f'another config: {re.escape(message)}'):
        lock(tmp_path, set_at(CONFIG, **change), step)
    assert (tmp_path / 'config.json').read_text() == before
    lock(tmp_path, CONFIG, step)  # the failed attempt holds no lock


def test_every_change_is_kept_with_the_steps_before_it(tmp_path):
    lock(tmp_path, CONFIG)
    lock(tmp_path, set_at(CONFIG, stages__1__num_steps=30), 10)
    lock(tmp_path, set_at(CONFIG, stages__1__num_steps=30, name='b'), 20)
    lock(tmp_path, {**set_at(CONFIG, name='b'), 'stages': [*CONFIG['stages'], {**STAGE, 'name': '16K'}]}, 80)
    assert recorded_changes(tmp_path) == [
        {'step': 70, 'field': 'stages.1.num_steps', 'old': 90, 'new': 30},  # its stage begins there
        {'step': 20, 'field': 'name', 'old': 'a', 'new': 'b'},
        {'step': 80, 'field': 'stages.1.num_steps', 'old': 30, 'new': 90},
        {'step': 100, 'field': 'stages.2', 'old': '(absent)', 'new': '16K'}]


def test_a_folder_is_locked_to_one_config_and_one_process(tmp_path, monkeypatch):
    held = lock_workdir(tmp_path, CONFIG)
    with pytest.raises(ValueError, match='another process runs in'):
        lock_workdir(tmp_path, CONFIG)
    held.close()
    with pytest.raises(ValueError, match=r'name "a" -> "b", stages.1 "8K" -> \(absent\); set this back'):
        lock_workdir(tmp_path, set_at(CONFIG, name='b', stages__1=None))  # where nothing may change
    with pytest.raises(ValueError, match=r'e \(absent\) -> 1 and 3 more'):
        lock(tmp_path, {**CONFIG, **dict.fromkeys('abcdefgh', 1)})

    def unsupported(*args):
        raise OSError(95, 'Operation not supported')

    monkeypatch.setattr(fcntl, 'flock', unsupported)  # as on some network file systems
    lock(tmp_path, CONFIG)
    for damaged in ('', '[1]', '{"stages": 5}'):
        (tmp_path / 'config.json').write_text(damaged)
        with pytest.raises(ValueError, match='config.json is damaged'):
            lock(tmp_path, CONFIG)


def test_what_earlier_versions_did_not_record_is_not_compared(tmp_path):
    lock(tmp_path, {**CONFIG, 'inputs': {'tokens': 5}})
    lock(tmp_path, {**CONFIG, 'inputs': {'tokens': 5, 'training': 'a'}})
    with pytest.raises(ValueError, match='inputs.training "a" -> "b"'):
        lock(tmp_path, {**CONFIG, 'inputs': {'tokens': 5, 'training': 'b'}})


def test_documents_that_swapped_their_texts_are_named(tmp_path):
    texts = [f'This is the text of document {name}.' for name in 'abcd']

    def rows(texts):
        documents = [np.array(text, np.int32) for text in TOKENIZER.encode_batch(texts)]
        return MemorySource(documents, TOKENIZER)

    corpus.check_documents(rows(texts), tmp_path)  # nothing is recorded yet
    corpus.record_documents(rows(texts), tmp_path)
    corpus.check_documents(rows(texts), tmp_path)
    swapped = rows([texts[0], texts[2], texts[1], texts[3]])
    corpus.record_documents(swapped, tmp_path)  # once
    with pytest.raises(ValueError, match=r"document 2 of 4 \('This is the text' \.\.\.\) and 1 more had"):
        corpus.check_documents(swapped, tmp_path)
    with pytest.raises(ValueError, match='over 4 training documents, but the corpus has 3'):
        corpus.check_documents(rows(texts[1:]), tmp_path)
    identities = [corpus.corpus_identity(each, [np.arange(3)]) for each in (rows(texts), swapped)]
    assert identities[0].pop('training') != identities[1].pop('training') and identities[0] == identities[1]
    (tmp_path / corpus.DOCUMENTS).write_bytes(b'')
    with pytest.raises(ValueError, match='documents.npy is damaged .*; delete it'):
        corpus.check_documents(rows(texts), tmp_path)
