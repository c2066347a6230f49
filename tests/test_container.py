"""The lock files hold what setup.py asks for, by hash, and the Dockerfile copies what exists."""

import ast
import pathlib
import re

import pytest
from packaging.requirements import Requirement

ROOT = pathlib.Path(__file__).parents[1]
LOCKED_EXTRAS = ('test', 'corpus', 'gguf', 'serve', 's3', 'gcs')


def setup_arguments():
    call, = (node for node in ast.walk(ast.parse((ROOT / 'setup.py').read_text()))
             if isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'setup')
    return {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords
            if keyword.arg in ('install_requires', 'extras_require')}


@pytest.mark.parametrize('name, extras', [('cpu', ()), ('cuda13', ('cuda13',))])
def test_a_lock_file_satisfies_setup_py(name, extras):
    lines = (ROOT / 'locks' / f'{name}.txt').read_text().splitlines()
    text = '\n'.join(line for line in lines if not line.startswith('#'))
    assert '://' not in text
    locked = {}
    for block in re.split(r'\n(?=\w)', text.strip()):
        package, version = re.match(r'([\w.-]+)==([\w.]+)', block).groups()
        locked[package.lower().replace('_', '-')] = version
        assert re.search(r'--hash=sha256:[0-9a-f]{64}', block), package
    arguments = setup_arguments()
    wanted = arguments['install_requires'] + [
        text for extra in (*LOCKED_EXTRAS, *extras) for text in arguments['extras_require'][extra]]
    for text in wanted:
        requirement = Requirement(text)
        assert requirement.specifier.contains(locked[requirement.name.lower().replace('_', '-')]), text
    assert any(package.startswith('nvidia-') for package in locked) == (name == 'cuda13')


def test_the_dockerfile_copies_what_exists_and_is_not_ignored():
    text = (ROOT / 'Dockerfile').read_text()
    kept = {line[1:] for line in (ROOT / '.dockerignore').read_text().splitlines() if line.startswith('!')}
    for line in re.findall(r'^COPY (.*)$', text, re.MULTILINE):
        for source in line.split()[:-1]:
            for accelerator in ('cpu', 'cuda13'):
                path = source.replace('${ACCELERATOR}', accelerator)
                assert (ROOT / path).exists() and path.split('/')[0] in kept, path
    assert re.search(r'^FROM python:3\.11', text, re.MULTILINE)  # the locks are for it
