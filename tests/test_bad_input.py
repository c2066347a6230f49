"""What a user can get wrong ends in one sentence, before any compute and with nothing half-written; what the
machine can decide is decided for them."""

import argparse
import json
import os
import pathlib
import shutil
import sys

import bench_balance
import extend
import make_ruler
import pytest

from lct.cli.config import fit_ring, load_config, make_run, set_field
from lct.cli.main import needs, run_script
from lct.cli.model import load_model
from lct.train import loop

EXPERIMENTS = pathlib.Path(__file__).parents[1] / 'experiments'




@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Runs the main job with flags and returns its one-sentence error; training must never begin."""
    def no_compute(*args, **kwargs):
        raise AssertionError('the run began to compute')

    monkeypatch.setattr(loop, 'train', no_compute)
    monkeypatch.setattr('lct.eval.recall_probe.run', no_compute)

    def run(*flags, workdir=tmp_path / 'run'):
        monkeypatch.setattr(sys, 'argv', ['extend.py', '--config', str(EXPERIMENTS / 'configs' / 'smoke.py'),
                                          '--workdir', str(workdir), *flags])
        with pytest.raises(SystemExit) as stop:
            run_script(extend.run)
        assert stop.value.code == 1
        error = capsys.readouterr().err.strip()
        assert error.startswith('error: ') and '\n' not in error
        leftovers = [p for p in pathlib.Path(tmp_path).rglob('*') if p.name in ('model', 'results.json')]
        assert not leftovers
        return error

    return run


@pytest.fixture
def model(tmp_path):
    """A copy of the shipped base model, to be broken."""
    return shutil.copytree(EXPERIMENTS / 'base', tmp_path / 'copy')


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_mesh_larger_than_the_devices(refused):
    assert '= 64 devices but this process has 8' in refused('--mesh', '1,1,64,1')


def test_a_sequence_that_does_not_divide(refused):
    assert 'seq_len 1000 is not a multiple of 2 * ring_size = 16' in refused('--set', 'stages.1.seq_len=1000')


def test_truncated_safetensors(refused, model):
    path = model / 'model.safetensors'
    os.truncate(path, path.stat().st_size // 2)
    assert 'model.safetensors' in refused('--set', f'model_folder={model}')


def test_a_missing_shard_of_an_index(refused, model):
    names = {'model.embed_tokens.weight': 'model-00001-of-00002.safetensors'}
    (model / 'model.safetensors').unlink()
    (model / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': names}))
    assert 'model-00001-of-00002.safetensors' in refused('--set', f'model_folder={model}')


def test_an_unknown_rope_type(refused, model):
    scaling = {'rope_type': 'spiral', 'factor': 2.0}
    edit_json(model / 'config.json', rope_scaling=scaling, rope_parameters=None)
    assert 'spiral' in refused('--set', f'model_folder={model}')


def test_a_tokenizer_larger_than_the_vocabulary(refused, model):
    fields = json.loads((model / 'tokenizer.json').read_text())
    fields['added_tokens'].append({**fields['added_tokens'][0], 'id': 1392, 'content': '<|one more|>'})
    (model / 'tokenizer.json').write_text(json.dumps(fields))
    error = refused('--set', f'model_folder={model}')
    assert 'the tokenizer has 1393 ids but the model has vocab_size 1392' in error


def test_an_empty_corpus(refused, tmp_path):
    (tmp_path / 'texts').mkdir()
    assert 'holds no text' in refused('--set', f'corpus={tmp_path / "texts"}')


def test_a_corpus_shorter_than_one_sequence(refused, tmp_path):
    for name in 'abcdefgh':
        (tmp_path / f'{name}.txt').write_text(f'a few words, {name}')
    assert 'fewer than one sequence' in refused('--set', f'corpus={tmp_path}/*.txt')


def test_an_output_folder_that_cannot_be_made(refused, tmp_path):
    (tmp_path / 'file').write_text('in the way')
    assert 'file' in refused(workdir=tmp_path / 'file' / 'run')


def test_a_full_disk(refused, monkeypatch):
    full = shutil._ntuple_diskusage(10**9, 10**9, 0)
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: full)
    assert 'free' in refused()


def test_a_work_directory_of_another_config(refused, tmp_path):
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'config.json').write_text('{}')
    assert 'holds a run with another config' in refused()


def test_no_model_folder_and_unknown_fields(refused):
    assert 'model_folder is empty' in refused('--set', 'model_folder=')
    assert 'the config has no field stages.0.lenght' in refused('--set', 'stages.0.lenght=5')
    assert 'mesh' in refused('--mesh', '1,1,x,1')


@pytest.mark.parametrize('setting, sentence', [
    ('corpus=', 'config.corpus is empty; add --set corpus=PATH'),
    ('save_dtype=int8', "dtype 'int8' is not supported for weights; use one of float32, float16, bfloat16"),
    ('param_dtype=foo', "param_dtype 'foo' must be 'float32' or 'bfloat16'"),
    ('param_dtype=int8', "param_dtype 'int8' must be"),
    ('checkpoint_every=0', 'checkpoint_every 0 must be at least 1'),
    ('keep_checkpoints=0', 'keep_checkpoints 0 must be at least 1'),
    ('max_skips_in_row=0', 'max_skips_in_row 0 must be at least 1'),
    ('seed=-1', 'config.seed -1 must be 0 or more'),
    ('optimizer.b1=1', 'optimizer b1 1.0 must be at least 0 and below 1'),
    ('optimizer.b2=nan', 'optimizer b2 nan must be at least 0 and below 1'),
    ('optimizer.weight_decay=-0.1', 'optimizer weight_decay -0.1 must be 0 or a positive number'),
    ('optimizer.clip_norm=0', 'optimizer clip_norm 0.0 must be positive'),
    ('stages.0.alpha=-1', 'stage 512: alpha -1.0 must be a positive number'),
    ('fit_ring=maybe', "fit_ring is True, and 'maybe' is not true or false"),
])
def test_a_wrong_value_claims_no_work_directory(refused, tmp_path, setting, sentence):
    assert sentence in refused('--set', setting)
    assert not (tmp_path / 'run' / 'config.json').exists()


def test_true_and_false_can_be_set():
    config = load_config(EXPERIMENTS / 'configs' / 'smoke.py')
    set_field(config, 'fit_ring=False')
    assert config.fit_ring is False
    set_field(config, 'fit_ring=true')
    assert config.fit_ring is True


def test_a_config_that_does_not_exist_is_answered_with_those_that_do():
    known = r'nowhere.py does not exist; .* laptop.py, .*published/lwm_text_7b.py, .*smoke.py'
    with pytest.raises(ValueError, match=known):
        load_config('nowhere.py')


@pytest.mark.parametrize('name', ['README.md', 'lct/ops/theta.py'])
def test_a_file_that_is_not_a_config(name):
    with pytest.raises(ValueError, match='is not a config; give a Python file with get_config'):
        load_config(EXPERIMENTS.parent / name)


@pytest.mark.parametrize('count, ring', [(1, 1), (3, 2), (7, 4), (8, 8), (64, 8)])
def test_the_ring_fits_the_accelerators_of_a_machine(count, ring):
    config = load_config(EXPERIMENTS / 'configs' / 'laptop.py')
    fit_ring(config, count)
    assert {stage.mesh for stage in config.stages} == {(1, 1, ring, 1)}
    make_run(config)  # every stage still divides


def sentence(function, capsys, **options):
    """What run_script says of a script that stops."""
    with pytest.raises(SystemExit):
        run_script(function, **options)
    error = capsys.readouterr().err.strip()
    assert '\n' not in error
    return error


@pytest.mark.parametrize('script, flags, message', [
    (make_ruler, 'DIR --tokenizer bytes --tasks foo', "unknown task 'foo'"),
    (make_ruler, 'DIR --tokenizer bytes --lengths 1Q', '--lengths 1Q must be lengths in tokens, such as 8K'),
    (make_ruler, 'DIR --tokenizer bytes --samples 0', '--samples 0 must be a whole number above 0'),
    (make_ruler, 'DIR --tokenizer DIR/none', 'none does not exist; give a tokenizer.json'),
    (bench_balance, '--length 1001', 'seq_len 1001 is not a multiple of ring_size = 2'),
    (bench_balance, '--rings 2 0', '--rings 0 must be a whole number above 0'),
])
def test_other_scripts(script, flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['script', *flags.replace('DIR', str(tmp_path / 'run')).split()])
    assert message in sentence(script.main, capsys)


@pytest.mark.parametrize('flags, message', [
    ({'model': '/nonexist'},
     "--model /nonexist is not a folder; give a Hugging Face folder, 'base' or 'smollm2'"),
    ({'piece': -4}, '--piece -4 must be a whole number above 0'),
    ({'batch_tokens': 0}, '--batch-tokens 0 must be a whole number above 0'),
])
def test_a_model_that_is_to_be_asked(flags, message):
    with pytest.raises(ValueError, match=message):
        load_model(argparse.Namespace(**{'model': 'base', 'piece': None, 'batch_tokens': 1, **flags}))


def test_a_folder_that_cannot_be_written(refused, tmp_path):
    (tmp_path / 'file').touch()
    assert refused(workdir=tmp_path / 'file').endswith('(File exists); name another file or folder')


def test_a_package_that_is_missing(capsys):
    def script():
        with needs("'.[oracle]'"):
            import no_such_package.part  # noqa: F401

    assert sentence(script, capsys) == (
        "error: this script needs the package no_such_package; pip install '.[oracle]'")


@pytest.mark.parametrize('resumes', (False, True))
def test_only_runs_that_continue_say_so(resumes, capsys):
    def script():
        raise KeyboardInterrupt

    assert ('continues' in sentence(script, capsys, resumes=resumes)) is resumes


def test_an_error_decides_on_the_exit_status(capsys):
    class Lost(RuntimeError):
        exit_status = 76

    def script(error):
        raise error

    for error, status, message in ((Lost('gone'), 76, 'error: gone'), (OSError('full'), 1, 'error: full'),
                                   (TypeError('a\nb'), 1, 'error: TypeError: a (')):
        with pytest.raises(SystemExit) as ended:
            run_script(lambda error=error: script(error))
        printed = capsys.readouterr().err.splitlines()
        assert ended.value.code == status and len(printed) == 1 and printed[0].startswith(message)
