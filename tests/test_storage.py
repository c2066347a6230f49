"""Paths with a scheme: refused where they would become local folders called 's3:'."""

import re
import subprocess
import sys

import pytest

from lct import files, storage
from lct.cli import urls


@pytest.mark.parametrize('path, scheme', [
    ('s3://bucket/a', 's3'), ('GS://bucket', 'gs'), ('s3:/bucket/a', 's3'), ('file:///tmp/a', 'file'),
    ('runs/laptop', ''), ('/data/a:b/c', ''), ('C:/data', ''), ('', ''), ('data/**/*.txt', '')])
def test_scheme_of(path, scheme):
    assert storage.scheme_of(path) == scheme


@pytest.mark.parametrize('arguments, problem', [
    (['--workdir', 'gs://b/run'], '--workdir gs://b/run has the scheme gs://'),
    (['--output=s3://b/x'], '--output s3://b/x'),
    (['--compare', 'runs/a', 's3:/b'], '--compare s3:/b'),
    (['--output', 'file:///data'], '--output file:///data .* without file://'),
    (['web=s3://b/c?x=y'], r'web=s3://b/c\?x=y'),
    (['https://example.com/corpus'], 'https://example.com/corpus'),
])
def test_a_scheme_is_refused_in_any_argument(arguments, problem):
    with pytest.raises(ValueError, match='^' + problem):
        urls.check_arguments(arguments, ())


def test_other_arguments_are_taken():
    urls.check_arguments(['--url', 'http://127.0.0.1:8000/v1', '--question', 'gs://x, is it fast?', '--set',
                          'a=1', '--files', 'README.md', '--lengths=1,2', 'name=runs/a'], ())


def test_a_script_refuses_before_it_does_anything(tmp_path):
    script = "from lct.cli.main import run_script; run_script(lambda: print('began'))"
    done = subprocess.run([sys.executable, '-c', script, '--workdir', 's3://b/run'], capture_output=True,
                          text=True, cwd=tmp_path)
    assert re.fullmatch(r'error: --workdir s3://b/run has .*\n', done.stderr)
    assert (done.returncode, done.stdout, list(tmp_path.iterdir())) == (1, '', [])


def test_a_scheme_is_refused_in_any_field_of_a_config():
    with pytest.raises(ValueError, match=r'^config\.stages\.0\.log gs://b has'):
        urls.check_config({'corpus': 'memory://b/c', 'stages': [{'log': 'gs://b'}]})


def test_no_file_is_written_under_a_name_with_a_scheme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match='s3:/b/results.json has the scheme'):
        files.write_atomically('s3:/b/results.json', '{}')
    assert not list(tmp_path.iterdir())
