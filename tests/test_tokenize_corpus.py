import concurrent.futures
import gzip
import json
import pathlib
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import tokenizers as library

from lct.data import tokenizer
from lct.data.corpus import files as corpus_files
from lct.data.corpus import parts
from lct.data.corpus import tokenize as tokenize_module
from lct.data.corpus.tokenize import Options, tokenize_corpus
from lct.data.sequence import KINDS, TEXT

ROOT = pathlib.Path(__file__).parents[1]
SCRIPT = ROOT / 'experiments' / 'tokenize_corpus.py'
WORDS = 'the cat sat on a mat, didn\'t it? 1234 naïve 北京 "quoted" (x) {y: [z]}'.split()


def text(rng, count):
    """Prose with lines, paragraphs and runs of blanks."""
    seps = rng.choice(['\n', '\n\n', '  ', '\t', ' '], count, p=[.1, .02, .02, .01, .85])
    return ''.join(word + sep for word, sep in zip(rng.choice(WORDS, count), seps, strict=True))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A corpus of 1.5 MB with one long document, and a tokenizer for it."""
    folder = tmp_path_factory.mktemp('corpus')
    rng = np.random.default_rng(0)
    files = folder / 'files'
    for name in ('books/long.txt', 'books/empty.txt', 'web/b.jsonl', 'web/a.md', 'web/c.jsonl.gz'):
        (files / name).parent.mkdir(parents=True, exist_ok=True)
    (files / 'books/long.txt').write_text(text(rng, 120_000))
    (files / 'books/empty.txt').write_text('')
    (files / 'web/a.md').write_text('\ufeffx')
    lines = [json.dumps({'text': text(rng, int(n))}) for n in rng.lognormal(4, 2, 300)]
    (files / 'web/b.jsonl').write_text('\n'.join(lines[:200]))
    (files / 'web/c.jsonl.gz').write_bytes(gzip.compress('\n'.join(lines[200:] + ['{"text": ""}']).encode()))
    tokenizer.train([text(rng, 3000)], 600, folder / 'tokenizer.json')
    return folder


@pytest.fixture(scope='module')
def store(folder):
    """The store of the corpus, by one worker that nobody stopped."""
    return tokenize_corpus([folder / 'files'], folder / 'tokenizer.json', folder / 'store', workers=1,
                           shard_tokens=80_000)


def contents(folder):
    return {path.name: path.read_bytes() for path in pathlib.Path(folder).iterdir()}


def script(*args, limit=None):
    command = [sys.executable, str(SCRIPT), *map(str, args)]
    if limit is not None:
        command = ['bash', '-c', f'ulimit -f {limit}; exec "$@"', 'bash', *command]
    return subprocess.run(command, capture_output=True, text=True)


def test_every_document_is_what_the_library_makes_of_it_whole(folder, store):
    expected = []
    for path in (folder / 'files' / name for name in (
            'books/empty.txt', 'books/long.txt', 'web/a.md', 'web/b.jsonl', 'web/c.jsonl.gz')):
        name = path.relative_to(folder / 'files').as_posix()
        content = gzip.decompress(path.read_bytes()) if path.suffix == '.gz' else path.read_bytes()
        if '.jsonl' in name:
            expected += [(f'{name}:{i}', json.loads(line)['text'])
                         for i, line in enumerate(content.decode().split('\n'), 1)]
        else:
            expected.append((name, content.decode('utf-8-sig')))
    num_empty = [content for _, content in expected].count('')
    expected = [(name, content) for name, content in expected if content]
    assert list(store.names) == [name for name, _ in expected]
    theirs = library.Tokenizer.from_file(str(folder / 'tokenizer.json'))
    for number, (_, content) in enumerate(expected):
        ids = theirs.encode(content, add_special_tokens=False).ids
        assert store.tokens(number, 0, int(store.lengths[number])).tolist() == ids
    assert store.sources == ('books', 'web') and store.lengths.max() > 80_000
    assert store.counts == {'empty': num_empty, 'bad': 0, 'inexact_cuts': 0} and num_empty > 1
    assert store.tokenizer_hash == tokenizer.load(folder / 'tokenizer.json').fingerprint
    assert len(list(store.folder.glob('shard-*'))) > 2


KILLED = """
import os, signal, sys
from lct.data.corpus import tokenize
calls = []
def progress(p):
    calls.append(p)
    if len(calls) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
tokenize.tokenize_corpus([sys.argv[1]], sys.argv[2], sys.argv[3], workers=3, shard_tokens=80_000,
                         progress=progress)
"""


def test_killed_it_continues_to_the_same_bytes_with_other_workers(folder, store, tmp_path):
    args = [str(folder / 'files'), str(folder / 'tokenizer.json'), str(tmp_path / 's')]
    # The workers hold the other ends of the pipes: this returns when they too have ended.
    killed = subprocess.run([sys.executable, '-c', KILLED, *args], cwd=ROOT, capture_output=True, timeout=60)
    assert killed.returncode == -signal.SIGKILL and not (tmp_path / 's').exists()
    shards = (tmp_path / 's.partial' / 'store').glob('shard-*.npy')
    closed = {path: path.stat().st_mtime_ns for path in shards}
    assert 1 <= len(closed) < len(list(store.folder.glob('shard-*')))
    options = ['--output', args[2], '--workers', 2]
    refused = script(args[0], '--tokenizer', 'bytes', '--shard-tokens', 80_000, *options)
    assert refused.returncode == 1 and 'was begun with tokenizer' in refused.stderr
    assert len(refused.stderr) < 500
    refused = script(args[0], '--tokenizer', args[1], '--shard-tokens', 40_000, *options)
    assert refused.returncode == 1
    assert 'was begun with shard_tokens 80000, and this run has 40000' in refused.stderr
    again = script(args[0], '--tokenizer', args[1], '--shard-tokens', 80_000, *options)
    assert again.returncode == 0, again.stderr
    assert f'{store.num_documents} documents, {store.num_tokens} tokens' in again.stdout
    assert '100.0%' in again.stderr and 'tokens/s' in again.stderr and 'left' in again.stderr
    assert contents(args[2]) == contents(store.folder)
    assert not (tmp_path / 's.partial').exists()
    assert all((tmp_path / 's' / path.name).stat().st_mtime_ns == time for path, time in closed.items())

    verified = script('--verify', args[2])
    assert verified.returncode == 0 and f'{store.num_documents} documents' in verified.stdout
    shard = bytearray((tmp_path / 's' / 'shard-00001.npy').read_bytes())
    shard[5000] ^= 1
    (tmp_path / 's' / 'shard-00001.npy').write_bytes(shard)
    verified = script('--verify', args[2])
    assert verified.returncode == 1 and 'shard-00001.npy differs from what was written' in verified.stderr


def test_a_full_disk_leaves_nothing_under_the_name(folder, store, tmp_path):
    args = [folder / 'files', '--tokenizer', folder / 'tokenizer.json', '--output', tmp_path / 's',
            '--workers', 1, '--shard-tokens', 80_000]
    full = script(*args, limit=100)  # blocks of 1024 bytes a file: less than one shard
    assert full.returncode == 1 and 'cannot grow: File too large; make room' in full.stderr
    assert not (tmp_path / 's').exists() and list((tmp_path / 's.partial' / 'store').iterdir()) == []
    assert script(*args).returncode == 0
    assert contents(tmp_path / 's') == contents(store.folder)


def test_bad_documents_are_refused_or_counted(tmp_path):
    (tmp_path / 'in').mkdir()
    (tmp_path / 'in' / 'a.txt').write_bytes(b'good\n\xff')
    (tmp_path / 'in' / 'b.jsonl').write_text('{"text": "one"}\n{"text": \n{"text": "z"}\n')
    (tmp_path / 'in' / 'c.txt').write_text('three')
    with pytest.raises(ValueError, match='a.txt line 2 is not UTF-8 text.*or skip such documents'):
        tokenize_corpus([tmp_path / 'in'], 'bytes', tmp_path / 's', workers=1)
    skipped = []
    store = tokenize_corpus([tmp_path / 'in'], 'bytes', tmp_path / 's', workers=1,
                            options=Options(skip_bad=True),
                            progress=lambda p: skipped.extend(p.skipped))
    assert list(store.names) == ['b.jsonl:1', 'b.jsonl:3', 'c.txt'] and store.lengths.tolist() == [3, 1, 5]
    assert store.counts['bad'] == 2
    assert ['a.txt line 2' in skipped[0], 'b.jsonl line 2' in skipped[1]] == [True, True]


def test_a_corpus_is_corrected(tmp_path):
    """Before the first shard is closed nothing is kept; after it the error names the folder to remove."""
    def write(name, text):
        (tmp_path / name).write_text(text)
        return tokenize_corpus([tmp_path / 'a.jsonl', tmp_path / 'b.jsonl'], 'bytes', tmp_path / 's',
                               workers=1, shard_tokens=10)

    (tmp_path / 'b.jsonl').write_text('{"text": \n')
    with pytest.raises(ValueError, match='a.jsonl line 1'):
        write('a.jsonl', '{"text": \n')
    with pytest.raises(ValueError, match='b.jsonl line 1'):  # a.jsonl fills a shard
        write('a.jsonl', '{"text": "' + 'x' * corpus_files.BLOCK + '"}\n')
    message = 'the files of the corpus changed since .*s.partial was begun; remove that'
    with pytest.raises(ValueError, match=message):
        write('b.jsonl', '{"text": "y"}\n')
    shutil.rmtree(tmp_path / 's.partial')
    assert write('b.jsonl', '{"text": "y"}\n').num_documents == 2


def test_corpora_and_options_that_are_refused(tmp_path):
    (tmp_path / 'empty.txt').write_text('')
    for specs, options, message in [
            ([''], {}, 'the name of a corpus is empty; give a folder'),
            ([tmp_path / 'empty.txt'], {}, 'holds no text; a folder is searched for'),
            ([ROOT / 'README.md'], {'workers': 0}, 'workers 0 and shard_tokens 134217728 must be at least 1'),
            ([ROOT / 'README.md'], {'shard_tokens': 0}, 'shard_tokens 0 must be at least 1')]:
        with pytest.raises(ValueError, match=message):
            tokenize_corpus(specs, 'bytes', tmp_path / 's', **{'workers': 1, **options})
    assert list(tmp_path.iterdir()) == [tmp_path / 'empty.txt']
    for name in (TEXT, *KINDS):
        with pytest.raises(ValueError, match=f"a source of the corpus is named '{name}', which in a mix"):
            tokenize_corpus([f'{name}={ROOT / "README.md"}'], 'bytes', tmp_path / 's', workers=1)
    assert not (tmp_path / 's.partial').exists()  # refused before any work
    assert 'give SOURCE, --tokenizer and --output' in script('--tokenizer', 'bytes').stderr


def test_groups_do_not_depend_on_where_reading_begins(folder):
    bytes_tokenizer = tokenizer.load('bytes')
    groups = list(tokenize_module._groups([folder / 'files'], bytes_tokenizer, corpus_files.FIELDS, [0, 0]))
    num_bytes = sum(path.stat().st_size for path in (folder / 'files').rglob('*.*'))
    assert len(groups) > 4 and groups[-1][1].bytes_done == num_bytes
    for number in range(len(groups) - 1):
        rest = tokenize_module._groups([folder / 'files'], bytes_tokenizer, corpus_files.FIELDS,
                                       groups[number][1].cursor)
        assert list(rest) == groups[number + 1:]


class Inline:
    """A pool of processes that is this process."""

    def __init__(self, workers, context, start, arguments):
        start(*arguments)

    def submit(self, function, *arguments):
        future = concurrent.futures.Future()
        future.set_result(function(*arguments))
        return future

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def shutdown(self, **flags):
        pass


def start_inline(name, fields):
    tokenize_module._tokenizer, tokenize_module._fields = tokenizer.load(name), fields


def test_parts_join_to_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenize_module, 'ProcessPoolExecutor', Inline)
    monkeypatch.setattr(tokenize_module, '_start_worker', start_inline)
    monkeypatch.setattr(parts, 'UNIT', 4000)
    for i in range(40):
        source = tmp_path / 'in' / 'ab'[i % 2]
        source.mkdir(parents=True, exist_ok=True)
        (source / f'{i}.txt').write_text(f'{i} é ' * (1 + 37 * i % 400))
    (tmp_path / 'in' / 'b' / 'c.jsonl').write_text(
        '{"text": "x"}\n{"text": ""}\nnot JSON\n{"text": "y"}\n' * 9)

    def tokenize(name, part=None, shard_tokens=3000):
        return tokenize_corpus([tmp_path / 'in'], 'bytes', tmp_path / name, workers=1,
                               shard_tokens=shard_tokens, options=Options(skip_bad=True, part=part))

    one = tokenize('one')
    for part in (2, 1, 4):
        assert tokenize('many', (part, 4)) is None
    with pytest.raises(ValueError, match='lacks 1 of 4 parts, first 3-of-4; run them with --part 3/4'):
        parts.join(tmp_path / 'many')
    tokenize('many', (3, 4))
    assert tokenize('many', (3, 4)) is None
    with pytest.raises(ValueError, match='3-of-4 is complete, but its shard_tokens differs from .* remove'):
        tokenize('many', (3, 4), shard_tokens=2000)
    assert len(list((tmp_path / 'many.parts').iterdir())) == 4
    joined = parts.join(tmp_path / 'many')
    names = sorted(path.name for path in (tmp_path / 'one').iterdir())
    assert len(names) > 10 and one.counts['bad'] == 9 and joined.fingerprint == one.fingerprint
    for name in names:
        assert (tmp_path / 'one' / name).read_bytes() == (tmp_path / 'many' / name).read_bytes(), name
    assert not (tmp_path / 'many.parts').exists()


@pytest.mark.parametrize('count', [1, 3, 7, 50])
def test_parts_are_all_files_once(count):
    sizes = [int(n) for n in np.random.default_rng(count).integers(0, 2**26, 23)]
    ranges = [parts.files_of(sizes, part, count) for part in range(1, count + 1)]
    assert [number for first, end in ranges for number in range(first, end)] == list(range(23))
