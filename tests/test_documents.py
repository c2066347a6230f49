import json
import zlib

import pytest

from lct.data.corpus.documents import Document, read, split


def test_embedded_is_long_python_text_without_tests():
    documents = read(max_bytes=1_000_000)
    assert documents == read('embedded', max_bytes=1_000_000)
    assert 500_000 < sum(len(d.text.encode()) for d in documents) <= 1_000_000
    assert all(d.name.endswith('.py') and '/test' not in f'/{d.name}' for d in documents)


def test_folder_glob_file_and_jsonl(tmp_path):
    (tmp_path / 'sub').mkdir()
    (tmp_path / 'b.txt').write_text('bé')
    (tmp_path / 'empty.txt').write_text('')
    (tmp_path / '.hidden.txt').write_text('no')
    (tmp_path / 'weights.bin').write_bytes(b'\xff')
    (tmp_path / 'sub' / 'a.md').write_text('a')
    records = [json.dumps({'text': text}) for text in ('x', '', 'y z')]
    (tmp_path / 'sub' / 'c.jsonl').write_text('\n'.join(records) + '\n')
    lines = [Document('sub/c.jsonl:1', 'x'), Document('sub/c.jsonl:3', 'y z')]
    assert read(tmp_path) == [Document('b.txt', 'bé'), Document('sub/a.md', 'a'), *lines]
    assert read(str(tmp_path / '**' / '*.md')) == [Document('sub/a.md', 'a')]
    assert read(str(tmp_path / '*' / '*.jsonl')) == lines
    assert read(tmp_path / 'b.txt') == [Document('b.txt', 'bé')]
    assert read(tmp_path, max_bytes=4) == [Document('b.txt', 'bé'), Document('sub/a.md', 'a')]


def test_errors_name_the_place(tmp_path):
    with pytest.raises(FileNotFoundError, match='does not exist and matches no file; give a folder'):
        read(tmp_path / 'nowhere')
    with pytest.raises(ValueError, match='holds no text; a folder is searched for .*\\.txt'):
        read(tmp_path)
    (tmp_path / 'a.txt').write_text('four')
    with pytest.raises(ValueError, match='max_bytes 3 is less than the 4 bytes of the first document a.txt'):
        read(tmp_path, max_bytes=3)
    (tmp_path / 'b.txt').write_bytes(b'ok \xff')
    with pytest.raises(ValueError, match=r'b\.txt line 1 is not UTF-8 text \(byte 3 of the file\)'):
        read(tmp_path)


@pytest.mark.parametrize('line, message', [
    ('{"text": ', 'line 2 is not valid JSON'),
    ('[1]', "line 2 is not an object with a string field 'text'"),
    ('{"body": "x"}', "line 2 is not an object with a string field 'text'"),
    ('{"text": "\\ud800"}', 'line 2 has an unpaired surrogate at character 0'),
])
def test_bad_line_is_named_by_number(tmp_path, line, message):
    (tmp_path / 'a.jsonl').write_text('{"text": "fine"}\n' + line + '\n')
    with pytest.raises(ValueError, match=message):
        read(tmp_path / 'a.jsonl')


def test_split_is_by_name_alone():
    documents = [Document(f'{i}.txt', str(i)) for i in range(2000)]
    training, held = split(documents, 0.1)
    assert sorted(training + held) == sorted(documents) and 150 < len(held) < 250
    subset = documents[::-2]
    assert set(split(subset)[1]) == set(held) & set(subset)
    assert split(documents, 0) == (documents, [])


def test_a_copy_of_a_training_document_is_not_held_out():
    documents = [Document(f'{i}.txt', str(i)) for i in range(200)]
    training, held = split(documents, 0.1)
    name = next(name for name in map(str, range(100)) if zlib.crc32(name.encode()) / 2**32 < 0.1)
    new, copy = Document(name, 'new'), Document(name, training[0].text)
    assert split([*documents, new], 0.1) == (training, [*held, new])
    assert split([*documents, copy], 0.1) == (training, held)


def test_split_gives_each_side_a_document_or_refuses():
    for count in range(2, 30):
        documents = [Document(f'doc {i}', str(i)) for i in range(count)]
        for fraction in (1e-9, 0.1, 0.999):
            assert all(split(documents, fraction))
    with pytest.raises(ValueError, match='every held-out document repeats the text of a training document'):
        split([Document(f'doc {i}', 'x') for i in range(9)], 0.1)
    with pytest.raises(ValueError, match='give two or more, or use held_out=0'):
        split([Document('a', 'x')])
    with pytest.raises(ValueError, match='held_out 1 is not a fraction'):
        split([Document('a', 'x')], 1)
