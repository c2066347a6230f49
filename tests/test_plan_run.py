"""The road from a folder and a corpus to a config that extend.py runs as it is."""

import pathlib
import types

import numpy as np
import plan as planner
import pytest

from lct.cli import corpus, corpus_survey, extension_check, extension_run, plan_run
from lct.cli.config import EVALUATE, load_config, make_run
from lct.cli.plan_models import resolve
from lct.cli.problems import SeveralProblems
from lct.data.corpus.documents import Document
from lct.plan import hardware
from lct.train.observers import Observers

BASE = pathlib.Path(__file__).parents[1] / 'experiments' / 'base'


def test_a_folder_and_a_corpus_become_a_config_that_passes_every_check_of_a_run(tmp_path, capsys):
    texts = tmp_path / 'texts'
    texts.mkdir()
    for i in range(40):
        (texts / f'{i}.txt').write_text(f'Line {i} of a long letter about lamps and pumps.\n' * (20 + 10 * i))
    (texts / 'data.bin').write_bytes(b'\x00')
    path = tmp_path / 'mine.py'
    planner.run(['--model', str(BASE), '--context', '4K', '--stages', '2K,4K', '--hardware', 'cpu',
                 '--devices', '2', '--corpus', str(texts), '--output', str(path)])
    config = load_config(path)
    assert [stage.seq_len for stage in make_run(config).stages] == [2048, 4096]
    assert config.model_folder == str(BASE) and config.corpus == str(texts)
    assert 0 < config.loss.seq_len <= 4096 and max(config.needle.lengths) == 4096
    assert 'corpus_bytes' not in config
    text = capsys.readouterr().out
    assert '40 documents; not read: 1 .bin' in text and 'checked as extend.py does' in text
    config.devices = 8
    with pytest.raises(ValueError, match=r'the mesh .* takes 2 devices, and config.devices is 8'):
        extension_check.check_devices(config)


def test_one_consumer_card_trains_adapters_where_all_weights_do_not_fit(tmp_path, capsys):
    path = tmp_path / '8b.py'
    planner.run(['--model', 'llama3-8b', '--context', '64K', '--hardware', 'rtx4090', '--devices', '1',
                 '--output', str(path)])
    assert make_run(load_config(path)).adapter and 'does not fit 1 x rtx4090' in capsys.readouterr().out
    extension_check.print_check(load_config(path))
    assert 'not checked, as they are not given yet: --set model_folder' in capsys.readouterr().out


def test_everything_that_is_wrong_is_said_at_once(tmp_path):
    with pytest.raises(SeveralProblems) as error:
        planner.run(['--model', 'lama3-8b', '--context', '1X', '--hardware', 'h10', '--devices', '0',
                     '--stages', '8K;64K', '--corpus', str(tmp_path / 'nowhere')])
    text = str(error.value)
    for part in ('6 problems', "model 'lama3-8b' is not in the table; nearest are llama3-8b", "'1X' is not",
                 "hardware 'h10' is not", '--devices 0 must', '--stages 8K;64K must be lengths in tokens',
                 'nowhere does not exist'):
        assert part in text


@pytest.mark.parametrize(('native', 'context', 'lengths'), [
    (8192, 2**20, (2**16, 2**18, 2**20)), (8192, 2**16, (2**16,)), (2**17, 2**18, (2**18,)),
    (512, 8192, (2048, 8192)), (2**17, 2**16, (2**16,)), (8192, 100_000, (100_000,))])
def test_automatic_stages(native, context, lengths):
    assert plan_run.stage_lengths(native, context) == lengths


@pytest.mark.parametrize(('stages', 'sentence'), [
    ((2**16, 2**15), 'must be in ascending order and end at --context 32K'),
    ((2**13, 2**15), 'which the model reads already')])
def test_stages_that_cannot_be(stages, sentence):
    model = resolve('llama3-8b')
    model = model._replace(config=model.config.__class__(**{**vars(model.config),
                                                            'max_position_embeddings': 2**14}))
    with pytest.raises(ValueError, match=sentence):
        plan_run.check_lengths(plan_run.Request(model, 2**15, hardware.find('h100'), 8, stages))


def corpus_of(*lengths):
    documents = [Document(f'{i}.txt', str(i)) for i in range(len(lengths))]
    return corpus_survey.Survey(np.array(lengths), documents, estimated=False)


def test_a_corpus_that_would_not_fit_into_memory_is_refused(tmp_path, monkeypatch):
    (tmp_path / 'a.txt').write_text('x' * 1000)
    monkeypatch.setattr('lct.cli.corpus.host_memory', lambda: 4000.0)
    corpus.check_size(str(tmp_path), (), None)
    monkeypatch.setattr('lct.cli.corpus.host_memory', lambda: 3999.0)
    corpus.check_size(str(tmp_path), (), max_bytes=10)
    corpus.check_size(str(tmp_path), ('*.txt',), None)
    with pytest.raises(ValueError, match='GB of free memory here; make a token store of it'):
        corpus.check_size(str(tmp_path), (), None)


def test_held_out_text_suffices_where_it_can_and_training_keeps_a_row():
    held = corpus_survey.hold_out(corpus_of(*[1000] * 200), wanted=8000, needed=4096)
    assert held.tokens >= 8000 and held.fraction <= 0.1 and held.training + held.tokens == 200_000
    scarce = corpus_survey.hold_out(corpus_of(*[1000] * 10), wanted=50_000, needed=6000)
    assert scarce.training >= 6000 and scarce.documents >= 1


def test_a_row_of_short_documents_is_warned_of_and_of_long_ones_is_not():
    assert plan_run.mixture_for(corpus_of(*[100] * 50), 4096)[1].startswith('100% of the text is in docum')
    assert plan_run.mixture_for(corpus_of(*[9000] * 50), 4096) == ({'text': 1.0}, '')
    assert 'long' in plan_run.mixture_for(corpus_of(*[100] * 5000, *[5000] * 9), 4096)[0]


@pytest.mark.parametrize(('kind', 'row'), [
    ('NVIDIA GeForce RTX 4090', 'rtx4090'), ('NVIDIA RTX A6000', 'a6000'), ('NVIDIA L4', 'l4'),
    ('NVIDIA L40S', 'l40s'), ('NVIDIA A10G', 'a10g'), ('NVIDIA A100-SXM4-40GB', 'a100-40gb'),
    ('NVIDIA A100-SXM4-80GB', 'a100'), ('NVIDIA GH200 480GB', 'gh200'), ('NVIDIA H100 80GB HBM3', 'h100'),
    ('NVIDIA RTX 6000 Ada Generation', 'rtx6000ada'), ('NVIDIA RTX A1000', None), ('NVIDIA T4', None)])
def test_devices_are_found_in_the_table(kind, row):
    found = hardware.of_device(kind, 'gpu')
    assert found is (row and hardware.TABLE[row])


def job_of(evaluate, workdir):
    stages = types.SimpleNamespace(name='1K'), types.SimpleNamespace(name='2K')
    return types.SimpleNamespace(
        config={'evaluate': evaluate}, settings=types.SimpleNamespace(stages=stages), evaluation=None,
        base=None, start=None, observers=Observers(), rows=None, workdir=workdir, mesh=None)


@pytest.mark.parametrize('evaluate', EVALUATE)
def test_models_are_measured_when_the_config_asks_for_it(evaluate, monkeypatch, tmp_path):
    job, measured = job_of(evaluate, tmp_path), []

    def train(run, config, load, rows, workdir, stop, gate_scores, observers):
        if observers.after_stage:
            observers.after_stage(job.settings.stages[0], 'config', 'params')
        return 'config', 'params', {}

    monkeypatch.setattr('lct.train.loop.train', train)
    monkeypatch.setattr('lct.eval.before_after.measure', lambda _, name, *rest: measured.append(name) or name)
    results, *_ = extension_run.extend(job, [])
    before, between, after = EVALUATE[evaluate]
    assert measured == list(results) == ['base'] * before + ['1K'] * between + ['extended'] * after


def test_a_stage_of_an_earlier_call_is_left_out_for_its_missing_weights_alone(monkeypatch, tmp_path):
    def measure(_, name, config, load, *rest):
        if name == '1K':
            load()
        return name

    monkeypatch.setattr('lct.train.loop.train', lambda *arguments: ('config', 'params', {}))
    monkeypatch.setattr('lct.eval.before_after.measure', measure)
    assert list(extension_run.extend(job_of('each_stage', tmp_path), [])[0]) == ['base', 'extended']
    monkeypatch.setattr('lct.eval.before_after.measure', lambda _, name, *rest: {'base': name}[name])
    with pytest.raises(KeyError, match='1K'):
        extension_run.extend(job_of('each_stage', tmp_path), [])
