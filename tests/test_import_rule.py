"""The house rule over the syntax tree: who may import whom, and which libraries stop where."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / 'lct').rglob('*.py'))
MAX_LINES = 400

# What a module of the package may import from the package, besides its own folder.
BELOW = ('ops', 'models', 'bucket_cache', 'checksums', 'data', 'deferred_signals', 'environment',
         'exit_status', 'files', 'json_files', 'out_of_memory', 'sharding', 'processes', 'stop_signals',
         'storage', 'terminal', 'text', 'watchdog')
MAY_IMPORT = {
    'sharding': (),
    'exit_status': (),
    'last_resort': ('exit_status',),
    'stop_signals': ('exit_status', 'terminal', 'watchdog'),
    'terminal': (),
    'watchdog': ('exit_status', 'last_resort', 'terminal'),
    'abort_filter': (),
    'cpu_devices': (),
    'lost_interrupts': (),
    'clusters': (),
    'installation': (),
    'environment': ('installation',),
    'peers': ('exit_status', 'terminal'),
    'meeting': ('clusters', 'exit_status', 'installation', 'peers'),
    'processes': ('abort_filter', 'clusters', 'exit_status', 'installation', 'meeting', 'peers',
                  'terminal', 'watchdog'),
    'checksums': (),
    'deferred_signals': (),
    'out_of_memory': (),
    'storage': (),
    'files': ('storage',),
    'json_files': ('files',),
    'bucket_cache': ('files', 'storage'),
    'upload': ('bucket_cache', 'files', 'storage'),
    'work_files': ('checksums',),
    'mirror': ('bucket_cache', 'files', 'storage', 'upload', 'work_files'),
    'text': (),
    'data': ('bucket_cache', 'checksums', 'files', 'json_files', 'storage', 'terminal', 'text'),
    'ops': ('text',),
    'models': ('ops', 'deferred_signals', 'sharding', 'text'),
    'weights': BELOW,
    'train': BELOW,
    'eval': BELOW,
    'plan': BELOW,
    'serve': (*BELOW, 'eval', 'weights'),
    'cli': (*BELOW, 'clusters', 'cpu_devices', 'lost_interrupts', 'mirror', 'upload', 'weights', 'train',
            'eval', 'plan'),
}
# Libraries with one home: only files whose path starts like this import them.
HOMES = {
    'ml_collections': 'lct/cli/',
    'optax': 'lct/train/',
    'orbax': 'lct/train/',
    'tensorboardX': 'lct/train/',
    'starlette': 'lct/serve/',
}
NO_JAX = ('bucket_cache', 'checksums', 'data', 'deferred_signals', 'exit_status', 'files', 'json_files',
          'last_resort', 'lost_interrupts', 'mirror', 'stop_signals', 'storage', 'terminal', 'text', 'upload',
          'watchdog', 'work_files')  # numpy alone
JAX = ('jax', 'jaxlib', 'flax')


def imported(source):
    """(line, dotted name) of every import of a source, inside functions too; a name taken from a module is
    part of it. Relative imports start with a dot."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            module = '.' * node.level + (node.module or '')
            for alias in node.names:
                yield node.lineno, f'{module}.{alias.name}'


def unit(path):
    """'ops' of lct/ops/rope.py, 'sharding' of lct/sharding.py, '__init__' of lct/__init__.py."""
    return path.split('/')[1].removesuffix('.py')


def violations(path, source):
    """What a source at path (lct/...) imports against the rule, one sentence each."""
    own = unit(path)
    allowed = {own, *MAY_IMPORT.get(own, ())}
    out = []
    if own not in MAY_IMPORT and own != '__init__':
        out.append(f'{path}: {own} has no level; add it to MAY_IMPORT')
    for line, name in imported(source):
        top, *rest = name.split('.')
        place = f'{path}:{line}'
        if name.startswith('.'):
            out.append(f'{place}: relative import {name}; write it from lct')
        elif top == 'lct':
            if not rest or rest[0] not in allowed:
                out.append(f'{place}: {own} imports {name}; it may import {", ".join(sorted(allowed))}')
        elif top in HOMES and not path.startswith(HOMES[top]):
            out.append(f'{place}: {top} stays in {HOMES[top]}')
        elif own in NO_JAX and top in JAX:
            out.append(f'{place}: {own} imports {top}')
    return out


@pytest.mark.parametrize('path', FILES)
def test_imports_only_from_its_own_folder_and_below(path):
    assert violations(path, (ROOT / path).read_text()) == []


@pytest.mark.parametrize('path', FILES)
def test_no_file_is_too_long(path):
    lines = len((ROOT / path).read_text().splitlines())
    assert lines <= MAX_LINES, f'{path} has {lines} lines; make it two files'


def test_the_files_were_found():
    assert {unit(path) for path in FILES} >= {'sharding', 'ops', 'models', 'data', 'weights', 'train', 'eval'}


@pytest.mark.parametrize(('path', 'source'), [
    ('lct/ops/a.py', 'from lct.models import llama'),
    ('lct/ops/a.py', 'from lct import sharding'),
    ('lct/models/a.py', 'import lct.train.loop'),
    ('lct/models/a.py', 'from lct.data.layout import permutation'),
    ('lct/eval/a.py', 'def later():\n    from lct.train import loop'),
    ('lct/train/a.py', 'from lct.weights.llama_hf import load'),
    ('lct/weights/a.py', 'from lct import eval as evaluations'),
    ('lct/plan/a.py', 'from lct import *'),
    ('lct/sharding.py', 'import lct.ops.rope'),
    ('lct/__init__.py', 'from lct.models import llama'),
    ('lct/data/a.py', 'import jax.numpy as jnp'),
    ('lct/data/a.py', 'from flax import struct'),
    ('lct/files.py', 'import jax'),
    ('lct/text.py', 'import jax'),
    ('lct/text.py', 'from lct.ops import rope'),
    ('lct/models/a.py', 'import optax'),
    ('lct/eval/a.py', 'from orbax import checkpoint'),
    ('lct/eval/a.py', 'from tensorboardX import SummaryWriter'),
    ('lct/cli/a.py', 'from starlette.responses import Response'),
    ('lct/eval/a.py', 'from lct.serve import app'),
    ('lct/train/stages.py', 'from ml_collections import ConfigDict'),
    ('lct/train/loop.py', 'from lct.cli.config import load_config'),
    ('lct/train/a.py', 'from . import loop'),
    ('lct/extra/a.py', 'import math'),
])
def test_a_violation_is_caught(path, source):
    assert len(violations(path, source)) == 1


@pytest.mark.parametrize(('path', 'source'), [
    ('lct/ops/a.py', 'import jax\nfrom lct.ops import rope\nfrom lct.ops.masks import Tokens'),
    ('lct/models/a.py', 'from lct import sharding\nfrom lct.ops import rope\nfrom lct.models import llama'),
    ('lct/train/loop.py', 'import optax, orbax.checkpoint\nfrom lct.data.batches import loader'),
    ('lct/data/corpus/a.py', 'import numpy as np\nfrom lct.data import layout'),
    ('lct/data/corpus/a.py', 'from lct import files'),
    ('lct/cli/a.py', 'import ml_collections\nfrom lct.eval.tasks import ruler'),
])
def test_what_is_allowed_passes(path, source):
    assert violations(path, source) == []
