import gzip
import json
import math
import os
import re
import sys

import pytest

from lct.data import tokenizer as tokenizers
from lct.data.corpus import documents, files, listing
from lct.data.corpus.tokenize import tokenize_corpus


def whole(chunks, size):
    """A splitter that does not split."""
    yield ''.join(chunks), True


def small(chunks, size):
    """A splitter into segments of 1000 characters."""
    text = ''.join(chunks)
    for start in range(0, max(len(text), 1), 1000):
        yield text[start:start + 1000], True


def read(spec, fields=files.FIELDS, split=whole):
    """[Text] of all files of spec."""
    return [text for file in listing.find(spec) for block in files.blocks(file, split, fields)
            for text in files.texts(block, fields)]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / 'web' / 'deep').mkdir(parents=True)
    (tmp_path / 'web.txt').write_text('top')
    (tmp_path / 'web' / 'deep' / 'a.md').write_bytes(b'\xef\xbb\xbfa\r\nb')
    (tmp_path / 'web' / 'empty.txt').write_text('')
    (tmp_path / '.hidden.txt').write_text('no')
    (tmp_path / 'weights.bin').write_bytes(b'\xff')
    lines = [json.dumps({'text': f'line {i}', 'meta': {'set': 'xy'[i % 2]}}) for i in range(3)]
    content = f'{lines[0]}\n\n{lines[1]}\n{lines[2]}'.encode()
    (tmp_path / 'web' / 'b.jsonl.gz').write_bytes(gzip.compress(content))
    return tmp_path


@pytest.mark.parametrize('pack', [bytes, gzip.compress])
def test_a_line_of_json_is_never_loaded_beyond_a_limit(tmp_path, monkeypatch, pack):
    monkeypatch.setattr(files, 'MAX_LINE', 1000)
    monkeypatch.setattr(files, 'BLOCK', 100)
    lines = [json.dumps({'text': 'x' * n}) for n in (2000, 5, 900, 3000, 7, 50_000)]
    path = tmp_path / ('b.jsonl' + ('.gz' if pack is gzip.compress else ''))
    for end in ('', '\n'):
        path.write_bytes(pack(('\ufeff' + '\n'.join(lines) + end).encode()))
        found = read(path)
        assert [len(text.text) for text in found] == [0, 5, 900, 0, 7, 0]
        assert found[0].error == (f'{path} line 1 has 2,013 bytes, and a line may have 1,000; cut it into '
                                  'several records, or put its text into a file of its own')
        assert ' line 4 has 3,013 bytes' in found[3].error
        assert f' line 6 has {50_012 + len(end):,} bytes' in found[5].error
        assert [text.name for text in found] == [f'{path.name}:{i}' for i in range(1, 7)]


def test_folders_globs_and_names(folder):
    expected = [('web/b.jsonl.gz:1', 'web', 'line 0'), ('web/b.jsonl.gz:3', 'web', 'line 1'),
                ('web/b.jsonl.gz:4', 'web', 'line 2'), ('web/deep/a.md', 'web', 'a\r\nb'),
                ('web/empty.txt', 'web', ''),
                ('web.txt', folder.name, 'top')]
    assert [text[:3] for text in read(folder)] == expected
    assert [text[:3] for text in read(f'{folder}/**/*.md')] == [('web/deep/a.md', 'web', 'a\r\nb')]
    assert [text[:3] for text in read(folder / 'web.txt')] == [('web.txt', 'web', 'top')]
    assert [text[:3] for text in read(f'books={folder}/*.txt')] == [('books/web.txt', 'books', 'top')]
    named = read(folder / 'web' / 'b.jsonl.gz', files.Fields('text', 'meta.set'))
    assert [text.source for text in named] == ['x', 'y', 'x']
    with pytest.raises(FileNotFoundError, match='nowhere does not exist and matches no file'):
        read(folder / 'nowhere')


def test_blocks_hold_whole_lines_and_characters(tmp_path, monkeypatch):
    monkeypatch.setattr(files, 'BLOCK', 64)
    text = ''.join(f'{i}é中🙂 ' + 'x' * (i % 90) + '\n' for i in range(200))
    lines = text.split('\n')[:-1]
    (tmp_path / 'a.txt').write_text(text)
    records = [json.dumps({'text': line}, ensure_ascii=False) + '\n' for line in lines]
    (tmp_path / 'b.jsonl').write_text(''.join(records))
    segments = read(tmp_path / 'a.txt', split=small)
    assert ''.join(segment.text for segment in segments) == text
    assert [segment.ends_document for segment in segments] == [False] * (len(segments) - 1) + [True]
    assert len(segments) > 9
    records = read(tmp_path / 'b.jsonl')
    assert [(t.name, t.text) for t in records] == [(f'b.jsonl:{i}', line) for i, line in enumerate(lines, 1)]
    file, = listing.find(tmp_path / 'b.jsonl')
    reads = [block.bytes_read for block in files.blocks(file, whole)]
    assert len(reads) > 50 and reads == sorted(reads) and reads[-1] == (tmp_path / 'b.jsonl').stat().st_size


@pytest.mark.parametrize('line, message', [
    (b'{"text": ', r'b.jsonl line 2 is not valid JSON \(.*\); correct or remove it'),
    (b'[1]', "b.jsonl line 2 is not an object with a string field 'text'"),
    (b'null', "b.jsonl line 2 is not an object with a string field 'text'"),
    (b'{"body": "x"}', "b.jsonl line 2 is not an object with a string field 'text'"),
    (b'{"text": "\\ud800"}', 'b.jsonl line 2 has an unpaired surrogate at character 0'),
    (b'{"text": "\xff"}', r'b.jsonl line 2 is not UTF-8 text \(byte 10 of the line\)'),
    (b'[' * 100_000, 'b.jsonl line 2 is not valid JSON'),
])
def test_a_bad_line_is_named_and_the_others_are_read(tmp_path, line, message):
    (tmp_path / 'b.jsonl').write_bytes(b'{"text": "fine"}\n' + line + b'\n{"text": "too"}\n')
    first, bad, last = read(tmp_path / 'b.jsonl')
    assert (first.text, bad.text, last.text) == ('fine', '', 'too') and first.error is last.error is None
    assert re.search(message, bad.error)


@pytest.mark.parametrize('at', [0, 3, 62, 63, 64, 65, 1000])
def test_a_byte_that_is_not_utf8_is_found_wherever_it_is(tmp_path, monkeypatch, at):
    monkeypatch.setattr(files, 'BLOCK', 64)
    content = bytearray(b'ab\n' * 400)
    content[at] = 0xFF
    (tmp_path / 'a.txt').write_bytes(content)
    bad, = read(tmp_path / 'a.txt', split=small)
    line = content[:at].count(b'\n') + 1
    assert f'a.txt line {line} is not UTF-8 text (byte {at} of the file)' in bad.error
    assert bad.text == '' and bad.ends_document


def test_a_character_cut_by_the_end_of_the_file_is_found(tmp_path):
    (tmp_path / 'a.txt').write_bytes('x\nyé'.encode()[:-1])
    assert 'a.txt line 2 is not UTF-8 text (byte 3 of the file)' in read(tmp_path / 'a.txt')[0].error


@pytest.mark.parametrize('cut', [slice(0, -9), slice(0, 700)])
def test_a_truncated_file_is_refused(tmp_path, cut):
    text = json.dumps({'text': 'x y z ' * 9}) + '\n'
    packed = gzip.compress(b''.join(b'%d' % math.factorial(i % 300) + text.encode() for i in range(900)))
    for name in ('a.jsonl.gz', 'a.txt.gz'):
        (tmp_path / name).write_bytes(packed[cut])
        with pytest.raises(ValueError, match=f'{name} is truncated or damaged'):
            read(tmp_path / name)


def test_zst_of_several_frames(tmp_path):
    pa = pytest.importorskip('pyarrow')
    frames = [b''.join(b'{"text": "%d"}\n' % i for i in range(n, n + 10_000)) for n in (0, 10_000)]
    packed = b''.join(pa.compress(frame, 'zstd', asbytes=True) for frame in frames)
    (tmp_path / 'a.jsonl.zst').write_bytes(packed)
    assert [text.text for text in read(tmp_path)] == [str(i) for i in range(20_000)]
    (tmp_path / 'a.jsonl.zst').write_bytes(packed[:-5])
    with pytest.raises(ValueError, match='a.jsonl.zst is truncated or damaged'):
        read(tmp_path)


def test_parquet(tmp_path):
    pa = pytest.importorskip('pyarrow')
    import pyarrow.parquet as parquet
    values = [f'row {i} é' for i in range(200)]
    broken = [value.encode() for value in values]
    broken[150] = b'\xff'
    broken = pa.array(broken).cast(pa.string(), safe=False)
    meta = pa.array([{'set': 'ab'[i % 2], 'n': i} for i in range(200)])
    table = pa.table({'id': range(200), 'text': values, 'broken': broken, 'gaps': [None, *values[1:]],
                      'meta': meta})
    parquet.write_table(table, tmp_path / 'a.parquet', row_group_size=90)
    rows = read(tmp_path, files.Fields('text', 'meta.set'))
    assert [(t.name, t.source, t.text) for t in rows] == [
        (f'a.parquet:{i}', 'ab'[i % 2], value) for i, value in enumerate(values)]
    rows = read(tmp_path, files.Fields('broken'))
    assert [t.text for t in rows] == values[:150] + [''] + values[151:]
    assert 'a.parquet row 150 is not UTF-8 text' in rows[150].error
    first = read(tmp_path, files.Fields('gaps'))[0]
    assert "row 0 is not an object with a string field 'gaps'" in first.error
    with pytest.raises(ValueError, match="a.parquet has no column 'body', only id, text, broken, gaps, meta"):
        read(tmp_path, files.Fields('body'))
    (tmp_path / 'a.parquet').write_bytes((tmp_path / 'a.parquet').read_bytes()[:-20])
    with pytest.raises(ValueError, match='a.parquet is not a complete Parquet file'):
        read(tmp_path)


def test_the_package_that_reads_parquet_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'pyarrow.parquet', None)
    (tmp_path / 'a.parquet').write_bytes(b'PAR1')
    with pytest.raises(ValueError, match=r"read with the package pyarrow; pip install '\.\[corpus\]'"):
        read(tmp_path)


# -- the same corpus in every form, read into memory and into a store ----------------------------------------

DOCUMENTS = ['Naïve café.\r\nTwo lines, 東京\n', '\n \ttabs\n\nand blank lines ', 'x' * 300 + '\n',
             'one\rtwo \u2028three']


def text_files(folder):
    """A file per document, one of them behind a link, another with a byte order mark."""
    (folder / 'elsewhere').mkdir()
    (folder / 'corpus' / 'sub').mkdir(parents=True)
    (folder / 'elsewhere' / 'linked').write_bytes(DOCUMENTS[2].encode())
    (folder / 'corpus' / 'a.txt').write_bytes(b'\xef\xbb\xbf' + DOCUMENTS[0].encode())
    (folder / 'corpus' / 'sub' / 'b.md').write_bytes(DOCUMENTS[1].encode())
    (folder / 'corpus' / 'sub' / 'c.txt').symlink_to(folder / 'elsewhere' / 'linked')
    (folder / 'corpus' / 'sub' / 'd.json').write_bytes(DOCUMENTS[3].encode())
    (folder / 'corpus' / 'sub' / 'loop').symlink_to(folder / 'corpus')
    return folder / 'corpus'


def jsonl(end='\n'):
    lines = [json.dumps({'text': text, 'n': i}, ensure_ascii=bool(i % 2)) for i, text in enumerate(DOCUMENTS)]
    return ('\ufeff' + f'{end}{end}'.join(lines)).encode()


def packed_text_files(folder, pack, suffix):
    (folder / 'corpus').mkdir()
    for i, text in enumerate(DOCUMENTS):
        (folder / 'corpus' / f'{i}.txt{suffix}').write_bytes(pack(text.encode()))
    return folder / 'corpus'


def one_file(folder, name, content):
    (folder / name).write_bytes(content)
    return folder / name


def zst(content):
    return pytest.importorskip('pyarrow').compress(content, 'zstd', asbytes=True)


def parquet(path):
    pa = pytest.importorskip('pyarrow')
    import pyarrow.parquet
    pyarrow.parquet.write_table(pa.table({'n': range(len(DOCUMENTS)), 'text': DOCUMENTS}), path)
    return path


FORMS = {
    'folder': text_files,
    'glob': lambda folder: f'{text_files(folder)}/*.txt {folder}/corpus/sub/*.*'.split(),
    'named folder': lambda folder: f'books={text_files(folder)}',
    'text files': lambda folder: sorted(path for path in text_files(folder).glob('**/*.*') if path.is_file()),
    'gz of text': lambda folder: packed_text_files(folder, gzip.compress, '.gz'),
    'zst of text': lambda folder: packed_text_files(folder, zst, '.zst'),
    'jsonl': lambda folder: one_file(folder, 'a.jsonl', jsonl()),
    'jsonl with CRLF': lambda folder: one_file(folder, 'a.JSONL', jsonl('\r\n')),
    'gz of jsonl': lambda folder: one_file(folder, 'a.jsonl.gz', gzip.compress(jsonl())),
    'zst of jsonl': lambda folder: one_file(folder, 'a.jsonl.zst', zst(jsonl())),
    'parquet': lambda folder: parquet(folder / 'a.parquet'),
    'folder of records': lambda folder: parquet(folder / 'a.parquet').parent,
}


@pytest.mark.parametrize('form', FORMS)
def test_one_corpus_in_every_form_gives_the_same_texts_in_memory_and_in_a_store(tmp_path, form):
    (tmp_path / 'in').mkdir()
    specs = FORMS[form](tmp_path / 'in')
    specs = specs if isinstance(specs, list) else [specs]
    in_memory = [document for spec in specs for document in documents.read(spec)]
    store = tokenize_corpus(specs, 'bytes', tmp_path / 'store', workers=1)
    decode = tokenizers.load('bytes').decode
    in_store = [decode(store.tokens(i, 0, int(store.lengths[i]))) for i in range(store.num_documents)]
    assert [text for _, text in in_memory] == in_store == DOCUMENTS
    assert [name for name, _ in in_memory] == list(store.names)


def test_the_standard_library_is_a_corpus_of_both(tmp_path, monkeypatch):
    library = tmp_path / 'lib'
    for name in ('os.py', 'json/encoder.py', 'json.py', 'test/test_os.py', 'site-packages/x.py',
                 'config-3/y.py', 'z.txt'):
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_text(f'# {name}\n')
    monkeypatch.setattr('sysconfig.get_paths', lambda: {'stdlib': str(library)})
    found = documents.read('embedded')
    assert [name for name, _ in found] == ['json/encoder.py', 'json.py', 'os.py']
    assert [text for _, text in found] == ['# json/encoder.py\n', '# json.py\n', '# os.py\n']
    assert found == documents.read()
    store = tokenize_corpus(['embedded'], 'bytes', tmp_path / 'store', workers=1)
    assert list(store.names) == [name for name, _ in found] and store.sources == ('embedded',)
    os.mkdir(tmp_path / 'embedded')
    (tmp_path / 'embedded' / 'a.txt').write_text('of a folder')
    monkeypatch.chdir(tmp_path)
    assert documents.read('./embedded') == [('a.txt', 'of a folder')]
