"""run.json: written from the start on, complete, one for all calls of a run, and without secrets."""

import json
import subprocess
import sys

import jax
import pytest

from lct import environment
from lct.cli import run_record
from lct.train import stopping

CONFIG = {'seed': 3, 'stages': [{'name': 'a'}], 'adapter': {'rank': 4, 'seed': 5}}
INPUTS = {'tokenizer': 'ab12', 'model': {'model.safetensors': 'cd34'}}


def read(folder):
    return json.loads((folder / run_record.NAME).read_text())


def test_a_call_is_recorded_from_its_start_on(tmp_path, monkeypatch):
    monkeypatch.setenv('NCCL_DEBUG', 'INFO')
    monkeypatch.setenv('WANDB_API_KEY', 'secret-1')
    monkeypatch.setenv('LCT_ACCESS_TOKEN', 'secret-2')
    monkeypatch.setattr(sys, 'argv', ['extend.py', '--set', 'name=two parts'])
    resolved = {'attention_blocks': {'a': 'xla, because the platform is cpu'}}
    with run_record.call(tmp_path, CONFIG, INPUTS, resolved) as run_id:
        record = read(tmp_path)  # as a kill would leave it
    assert (record['config'], record['inputs'], record['id']) == (CONFIG, INPUTS, run_id)
    assert record['seeds'] == {'seed': 3, 'adapter.seed': 5}
    call, = record['calls']
    assert call['resolved'] == resolved
    assert call['command'] == "python extend.py --set 'name=two parts'"
    assert call['ended'] is None and call['outcome'] is None and call['started']
    here = record['environments'][call['environment']]
    assert here['packages']['jax'] == jax.__version__ and len(here['code_sha256']) == 64
    assert here['variables']['NCCL_DEBUG'] == 'INFO'
    assert here['devices']['count'] == 8 and here['devices']['platform'] == 'cpu'
    assert 'secret' not in json.dumps(record['calls']) + json.dumps(here['variables'])
    assert read(tmp_path)['calls'][0]['outcome'] == 'done'


def test_the_next_calls_are_added(tmp_path):
    with run_record.call(tmp_path, CONFIG, INPUTS) as first:
        pass
    with pytest.raises(SystemExit), run_record.call(tmp_path, {**CONFIG, 'seed': 4}, INPUTS) as second:
        sys.exit(130)
    with pytest.raises(ValueError), run_record.call(tmp_path, CONFIG, INPUTS):
        raise ValueError('mesh (3,)\nis odd')
    with pytest.raises(stopping.Interrupted), run_record.call(tmp_path, CONFIG, INPUTS):
        raise stopping.Interrupted('saved')
    record = read(tmp_path)
    assert first == second == record['id'] and record['seeds']['seed'] == 3
    assert [call['outcome'] for call in record['calls']] == [
        'done', 'stopped', 'ValueError: mesh (3,) is odd', 'Interrupted: saved']
    assert len(record['environments']) == 1 and all(call['ended'] for call in record['calls'])
    (tmp_path / run_record.NAME).write_text('{"id":')  # damaged: begun anew
    with run_record.call(tmp_path, CONFIG, INPUTS):
        assert len(read(tmp_path)['calls']) == 1


def test_the_git_state_names_what_differs(tmp_path):
    def git(*arguments):
        subprocess.run(['git', '-c', 'user.name=a', '-c', 'user.email=a@b', *arguments], cwd=tmp_path,
                       check=True, capture_output=True)

    assert environment.git_state(tmp_path) is None and environment.commit(tmp_path) is None
    git('init', '-b', 'main')
    (tmp_path / 'a.py').write_text('x = 1\n')
    git('add', '.')
    git('commit', '-m', 'one')
    clean = environment.git_state(tmp_path)
    assert len(clean['commit']) == 40 and (clean['branch'], clean['changed']) == ('main', [])
    assert clean['commit'].startswith(environment.commit(tmp_path)) and 'diff' not in clean
    (tmp_path / 'a.py').write_text('x = 2\n')
    changed = environment.git_state(tmp_path)
    assert changed['changed'] == ['a.py'] and '+x = 2' in changed['diff'] and changed['diff_sha256']
    assert environment.commit(tmp_path).endswith('-dirty')
