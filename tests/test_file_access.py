"""Where files are opened: scripts never do it themselves, and few modules write.

A path with a scheme such as s3:// is replaced by a local one where it enters (lct/cli/urls.py, bucket_cache,
mirror, upload). What is behind that has local paths, which it may open, map and lock.
"""

import ast
import pathlib

import pytest

from lct.data.corpus.store_writer import Writer
from lct.eval import provenance
from lct.files import write_atomically
from lct.train.checkpoint import Checkpoints
from lct.train.workdir import lock_workdir
from lct.weights import folders, llama_hf, llama_meta

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = sorted(path.relative_to(ROOT).as_posix() for path in
                 [*ROOT.glob('experiments/*.py'), *ROOT.glob('lct/cli/*.py')])
LIBRARY = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob('lct/**/*.py')
                 if path.parent.name != 'cli')
OPENED_BY_SCRIPTS = {
    'experiments/doctor.py': 'looks at the disk itself',
    'experiments/interleave.py': 'writes the temporary file of files.atomic_path',
    'lct/cli/corpus.py': 'hashes of documents in a local work directory',
    'lct/cli/host_memory.py': '/proc',
    'lct/cli/model.py': 'weights of a local folder, and a cache in a local work directory',
    'lct/cli/plan_models.py': 'the card of a local folder',
    'lct/cli/plan_recipe.py': 'a table of this repository',
    'lct/cli/program_cache.py': "compiled programs in the user's cache",
    'lct/cli/sessions.py': "sessions in the user's cache",
}
WRITING_MODULES = {
    'lct/files.py': 'atomic writes',
    'lct/json_files.py': 'files of a folder that weights/folders.py renames',
    'lct/bucket_cache.py': 'locks of copies', 'lct/mirror.py': 'local work directories',
    'lct/upload.py': 'local folders that are uploaded',
    'lct/processes.py': 'looks whether all processes share a folder',
    'lct/terminal.py': 'file descriptors', 'lct/watchdog.py': 'stacks of a run that hangs',
    'lct/data/corpus/parts.py': 'deletes the parts that it has joined',
    'lct/data/corpus/store_writer.py': 'shards that grow, under a lock',
    'lct/eval/runner.py': 'answers, appended one by one',
    'lct/train/append_file.py': 'metrics, appended', 'lct/train/bad_steps.py': 'lines, appended',
    'lct/train/checkpoint.py': 'sets damaged checkpoints aside', 'lct/train/metrics.py': 'drops rows',
    'lct/train/workdir.py': 'the lock',
    'lct/weights/companions.py': 'copies into the folder of an export',
    'lct/weights/folders.py': 'renames the folder of an export',
    'lct/weights/llama_hf.py': 'the card in the folder of an export',
    'lct/weights/safetensors_files.py': 'maps files of an export',
    'lct/weights/torch_files.py': 'maps files of an export', 'lct/weights/zip_files.py': 'the same',
    'lct/weights/session_writer.py': "sessions in the user's cache",
}
READING = {'open', 'read_text', 'read_bytes', 'np.load', 'np.memmap'}
WRITING = {'write_text', 'write_bytes', 'touch', 'os.open', 'os.replace', 'os.rename', 'os.truncate',
           'np.save', 'np.savez', 'shutil.rmtree', 'shutil.copyfile', 'shutil.copytree', 'shutil.move'}


def calls(source):
    """(name, call) of every call; 'open' for methods of that name too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            function = node.func
            if isinstance(function, ast.Name):
                yield function.id, node
                continue
            module = function.value.id if isinstance(function.value, ast.Name) else ''
            yield f'{module}.{function.attr}' if module in ('os', 'np', 'shutil') else function.attr, node


def modes(call):
    """The constants among the arguments of a call, of which one may be a mode."""
    return [value.value for value in [*call.args, *[keyword.value for keyword in call.keywords]]
            if isinstance(value, ast.Constant) and isinstance(value.value, str)]


def writes(name, call):
    """Whether a call changes files; open() only with such a mode."""
    if name in ('open', 'np.memmap'):
        return any(set(mode) <= set('rwaxb+t') and set(mode) & set('wax+') for mode in modes(call))
    return name in WRITING


def files_that_call(paths, condition):
    """{path: the calls that meet a condition} of the sources that have any."""
    found = {path: sorted({name for name, call in calls((ROOT / path).read_text()) if condition(name, call)})
             for path in paths}
    return {path: names for path, names in found.items() if names}


def test_scripts_open_no_files():
    found = files_that_call(SCRIPTS, lambda name, _: name in READING | WRITING)
    assert found.keys() == OPENED_BY_SCRIPTS.keys(), found  # use lct.files, or add it with a reason


def test_few_modules_write():
    found = files_that_call(LIBRARY, writes)
    assert found.keys() == WRITING_MODULES.keys(), found  # use lct.files, or add it with a reason


@pytest.mark.parametrize('source, expected', [
    ("open(x, 'w')", ['open']), ("p.open(mode='ab')", ['open']), ("open(x, 'rb')", []), ('open(x)', []),
    ("os.replace(a, b)", ['os.replace']), ("text.replace('a', 'w')", []),
    ("p.write_text('w')", ['write_text']),
    ("np.memmap(p, d, 'r+')", ['np.memmap']), ("np.memmap(p, d, 'r', 4)", [])])
def test_what_counts_as_writing(source, expected):
    assert [name for name, call in calls(source) if writes(name, call)] == expected


@pytest.mark.parametrize('write', [
    Checkpoints, lambda url: write_atomically(url, ''), lambda url: Writer(url, '', 1, {}),
    lambda url: lock_workdir(url, {}), lambda url: provenance.enter(pathlib.Path(url), {}),
    lambda url: folders.check_writable(url, 0), lambda url: llama_hf.save(url, None, None),
    lambda url: llama_meta.save(url, None, None)])
def test_no_module_makes_a_local_folder_of_a_url(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match='s3:/+bucket/run.* has the scheme s3://'):
        write('s3://bucket/run')
    assert not list(tmp_path.iterdir())
