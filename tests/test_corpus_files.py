import gzip
import json
import math
import re
import sys

import pytest

from lct.data.corpus import files


def whole(chunks, size):
    """A cutter that does not cut."""
    yield ''.join(chunks), True


def small(chunks, size):
    """A cutter into pieces of 1000 characters."""
    text = ''.join(chunks)
    for start in range(0, max(len(text), 1), 1000):
        yield text[start:start + 1000], True


def read(spec, fields=files.FIELDS, pieces=whole):
    """[Text] of all files of spec."""
    return [text for file in files.find(spec) for block in files.blocks(file, pieces, fields)
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
    (tmp_path / 'web' / 'b.jsonl.gz').write_bytes(gzip.compress(f'{lines[0]}\n\n{lines[1]}\n{lines[2]}'.encode()))
    return tmp_path


def test_folders_globs_and_names(folder):
    expected = [('web/b.jsonl.gz:1', 'web', 'line 0'), ('web/b.jsonl.gz:3', 'web', 'line 1'),
                ('web/b.jsonl.gz:4', 'web', 'line 2'), ('web/deep/a.md', 'web', 'a\r\nb'), ('web/empty.txt', 'web', ''),
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
    (tmp_path / 'b.jsonl').write_text(''.join(json.dumps({'text': line}, ensure_ascii=False) + '\n' for line in lines))
    pieces = read(tmp_path / 'a.txt', pieces=small)
    assert ''.join(piece.text for piece in pieces) == text
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True] and len(pieces) > 9
    records = read(tmp_path / 'b.jsonl')
    assert [(t.name, t.text) for t in records] == [(f'b.jsonl:{i}', line) for i, line in enumerate(lines, 1)]
    file, = files.find(tmp_path / 'b.jsonl')
    reads = [block.read for block in files.blocks(file, whole)]
    assert len(reads) > 50 and reads == sorted(reads) and reads[-1] == (tmp_path / 'b.jsonl').stat().st_size


@pytest.mark.parametrize('line, message', [
    (b'{"text": ', r'b.jsonl line 2 is not valid JSON \(.*\); correct or remove it'),
    (b'[1]', "b.jsonl line 2 is not an object with a string field 'text'"),
    (b'null', "b.jsonl line 2 is not an object with a string field 'text'"),
    (b'{"body": "x"}', "b.jsonl line 2 is not an object with a string field 'text'"),
    (b'{"text": "\\ud800"}', 'b.jsonl line 2 has half a surrogate pair at character 0'),
    (b'{"text": "\xff"}', r'b.jsonl line 2 is not UTF-8 text \(byte 10 of the line\)'),
    (b'[' * 100_000, 'b.jsonl line 2 is not valid JSON'),
])
def test_a_bad_line_is_named_and_the_others_are_read(tmp_path, line, message):
    (tmp_path / 'b.jsonl').write_bytes(b'{"text": "fine"}\n' + line + b'\n{"text": "too"}\n')
    first, bad, last = read(tmp_path / 'b.jsonl')
    assert (first.text, bad.text, last.text) == ('fine', '', 'too') and first.bad is last.bad is None
    assert re.search(message, bad.bad)


@pytest.mark.parametrize('at', [0, 3, 62, 63, 64, 65, 1000])
def test_a_byte_that_is_not_utf8_is_found_wherever_it_is(tmp_path, monkeypatch, at):
    monkeypatch.setattr(files, 'BLOCK', 64)
    content = bytearray(b'ab\n' * 400)
    content[at] = 0xFF
    (tmp_path / 'a.txt').write_bytes(content)
    bad, = read(tmp_path / 'a.txt', pieces=small)
    line = content[:at].count(b'\n') + 1
    assert f'a.txt line {line} is not UTF-8 text (byte {at} of the file)' in bad.bad and bad.text == '' and bad.ends


def test_a_character_cut_by_the_end_of_the_file_is_found(tmp_path):
    (tmp_path / 'a.txt').write_bytes('x\nyé'.encode()[:-1])
    assert 'a.txt line 2 is not UTF-8 text (byte 3 of the file)' in read(tmp_path / 'a.txt')[0].bad


@pytest.mark.parametrize('cut', [slice(0, -9), slice(0, 700)])
def test_a_file_cut_short_is_refused(tmp_path, cut):
    text = json.dumps({'text': 'x y z ' * 9}) + '\n'
    packed = gzip.compress(b''.join(b'%d' % math.factorial(i % 300) + text.encode() for i in range(900)))
    for name in ('a.jsonl.gz', 'a.txt.gz'):
        (tmp_path / name).write_bytes(packed[cut])
        with pytest.raises(ValueError, match=f'{name} is cut short or damaged'):
            read(tmp_path / name)


def test_zst_of_several_frames(tmp_path):
    pa = pytest.importorskip('pyarrow')
    frames = [b''.join(b'{"text": "%d"}\n' % i for i in range(n, n + 10_000)) for n in (0, 10_000)]
    packed = b''.join(pa.compress(frame, 'zstd', asbytes=True) for frame in frames)
    (tmp_path / 'a.jsonl.zst').write_bytes(packed)
    assert [text.text for text in read(tmp_path)] == [str(i) for i in range(20_000)]
    (tmp_path / 'a.jsonl.zst').write_bytes(packed[:-5])
    with pytest.raises(ValueError, match='a.jsonl.zst is cut short or damaged'):
        read(tmp_path)


def test_parquet(tmp_path):
    pa = pytest.importorskip('pyarrow')
    import pyarrow.parquet as parquet
    values = [f'row {i} é' for i in range(200)]
    broken = pa.array([v.encode() for v in values[:150]] + [b'\xff'] + [v.encode() for v in values[151:]]).cast(pa.string(), safe=False)
    meta = pa.array([{'set': 'ab'[i % 2], 'n': i} for i in range(200)])
    table = pa.table({'id': range(200), 'text': values, 'broken': broken, 'gaps': [None, *values[1:]], 'meta': meta})
    parquet.write_table(table, tmp_path / 'a.parquet', row_group_size=90)
    rows = read(tmp_path, files.Fields('text', 'meta.set'))
    assert [(t.name, t.source, t.text) for t in rows] == [
        (f'a.parquet:{i}', 'ab'[i % 2], value) for i, value in enumerate(values)]
    rows = read(tmp_path, files.Fields('broken'))
    assert [t.text for t in rows] == values[:150] + [''] + values[151:]
    assert 'a.parquet row 150 is not UTF-8 text' in rows[150].bad
    assert "row 0 is not an object with a string field 'gaps'" in read(tmp_path, files.Fields('gaps'))[0].bad
    with pytest.raises(ValueError, match="a.parquet has no column 'body', only id, text, broken, gaps, meta"):
        read(tmp_path, files.Fields('body'))
    (tmp_path / 'a.parquet').write_bytes((tmp_path / 'a.parquet').read_bytes()[:-20])
    with pytest.raises(ValueError, match='a.parquet is no whole Parquet file'):
        read(tmp_path)


def test_the_package_that_reads_parquet_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'pyarrow.parquet', None)
    (tmp_path / 'a.parquet').write_bytes(b'PAR1')
    with pytest.raises(ValueError, match=r"read with the package pyarrow; pip install '\.\[corpus\]'"):
        read(tmp_path)
