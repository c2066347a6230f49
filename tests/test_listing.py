"""Corpora as people have them: checkouts, archives, mail, arrays, and an account of what was not read."""

import bz2
import io
import json
import lzma
import subprocess
import sys
import tarfile

import pytest

from lct.data.corpus import documents, listing


def read(path, **options):
    """({name: text}, the Tally) of a corpus."""
    tally = listing.Tally()
    return {one.name: one.text for one in documents.read(path, tally=tally, **options)}, tally


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = folder / name.replace('__', '.').replace('_S_', '/')
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def tar(members):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode='w') as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def test_what_was_not_read_is_said_in_one_line(tmp_path):
    write(tmp_path, a__txt='a', b__txt='b', c__txt='c', d__pdf='x', e__pdf='x', notes='x', f__csv__zip='x',
          empty__txt='', _S_x='')
    (tmp_path / '.hidden').write_text('')
    (tmp_path / 'link').symlink_to(tmp_path)
    found, tally = read(tmp_path)
    assert list(found) == ['a.txt', 'b.txt', 'c.txt']
    assert tally.sentence().startswith('3 documents; not read: 2 .pdf, ')
    for part in ('1 without suffix', '1 .zip', '1 hidden', '1 links to folders', '1 empty'):
        assert part in tally.sentence()
    assert read(tmp_path, max_bytes=2)[1].sentence(2).startswith('2 of 4 documents (corpus_bytes 2)')
    (tmp_path / 'z.jsonl').write_text('{"text": "1"}\n{"text": "2"}\n')
    assert read(tmp_path)[1].sentence().startswith('5 documents of 4 files')


def test_a_checkout_gives_the_files_that_git_does_not_ignore(tmp_path):
    write(tmp_path, **{'__gitignore': 'build/\n*.log.txt\n', 'src_S_a__py': 'a', 'build_S_b__py': 'b',
                       'c__log__txt': 'c', 'src_S_new__py': 'new'})
    assert set(read(tmp_path)[0]) == {'src/a.py', 'build/b.py', 'c.log.txt', 'src/new.py'}
    git = ['git', '-C', str(tmp_path), '-c', 'user.name=a', '-c', 'user.email=a']
    subprocess.run([*git, 'init', '-q'], check=True)
    subprocess.run([*git, 'add', 'src/a.py'], check=True)
    marker = tmp_path / 'started'  # a stranger's settings must start no program
    (tmp_path / 'hook.sh').write_text(f'#!/bin/sh\ntouch {marker}\n')
    (tmp_path / 'hook.sh').chmod(0o755)
    subprocess.run([*git, 'config', 'core.fsmonitor', str(tmp_path / 'hook.sh')], check=True)
    found, tally = read(tmp_path)
    assert list(found) == ['hook.sh', 'src/a.py', 'src/new.py'] and not marker.exists()
    assert tally.sentence() == '3 documents; not read: 1 hidden'


@pytest.mark.parametrize('pattern, left', [
    ('b', {'a/x.txt', 'a/y.md'}), ('*.txt', {'a/y.md'}), ('a/*.md', {'a/x.txt', 'b/z.txt'}),
    ('a/', {'b/z.txt'}),
])
def test_patterns_exclude_files_and_folders(tmp_path, pattern, left):
    write(tmp_path, a_S_x__txt='x', a_S_y__md='y', b_S_z__txt='z')
    found, tally = read(tmp_path, exclude=[pattern])
    assert set(found) == left and tally.skipped['excluded'] == 3 - len(left)


def test_arrays_of_json_are_records_and_other_json_is_text(tmp_path):
    write(tmp_path, a__json=json.dumps([{'text': 'one'}, {'text': 'two'}]), b__json='{"text": "an object"}',
          c__json='["three"]', d__json='[1, 2]', e__json='[{"other": 1}]', f__json='[not json')
    assert read(tmp_path)[0] == {
        'a.json:0': 'one', 'a.json:1': 'two', 'b.json': '{"text": "an object"}', 'c.json:0': 'three',
        'd.json': '[1, 2]', 'e.json': '[{"other": 1}]', 'f.json': '[not json'}
    write(tmp_path, g__json='[{"text": "x"}, {"body": "y"}]')
    with pytest.raises(ValueError, match=r"g.json row 1 .* string field 'text' \(its strings are 'body'\)"):
        read(tmp_path)


@pytest.mark.parametrize('suffix, pack', [('.bz2', bz2.compress), ('.xz', lzma.compress)])
def test_other_compressions(tmp_path, suffix, pack):
    content = '\n'.join(json.dumps({'text': f'{i}é' * 20}) for i in range(9000)).encode()
    (tmp_path / f'a.jsonl{suffix}').write_bytes(pack(content))
    assert list(read(tmp_path)[0].values()) == [f'{i}é' * 20 for i in range(9000)]
    (tmp_path / f'a.jsonl{suffix}').write_bytes(pack(content)[:-40])
    with pytest.raises(ValueError, match='is truncated or damaged'):
        read(tmp_path)


def test_a_web_dataset_gives_the_text_of_each_sample(tmp_path):
    members = {'d/1.jpg': b'\xff\xd8', 'd/1.txt': b'one', 'd/1.json': b'{"text": "not this"}',
               'd/2.json': b'{"text": "two"}', 'd/2.cls': b'7', 'd/3.json': b'{"url": "x"}', 'e.md': b'four'}
    (tmp_path / 'a.tar').write_bytes(tar(members))
    (tmp_path / 'b.tar.bz2').write_bytes(bz2.compress(tar({'x.txt': b'packed'})))
    assert read(tmp_path)[0] == {'a.tar:d/1.txt': 'one', 'a.tar:d/2.json': 'two', 'a.tar:e.md': 'four',
                                 'b.tar.bz2:x.txt': 'packed'}
    (tmp_path / 'a.tar').write_bytes(tar({'1.jpg': b'', '2.jpg': b''}))
    with pytest.raises(ValueError, match=r'a.tar holds no member with text .*, only 2 .jpg; leave it out'):
        read(tmp_path)
    (tmp_path / 'a.tar').write_bytes(tar({'1.txt': b'x' * 2000})[:1500])
    with pytest.raises(ValueError, match='a.tar is truncated or damaged'):
        read(tmp_path)


def test_mailboxes_without_a_suffix_and_maildirs(tmp_path):
    mail = 'Subject: {}\n\nbody {}\n'
    write(tmp_path, Inbox=f'From a@b Mon\n{mail.format(1, 1)}\nFrom a@b Tue\n{mail.format(2, 2)}',
          README='From here on\nit is text', Maildir_S_cur_S_1__host=mail.format(3, 3))
    for name in ('new', 'tmp'):
        (tmp_path / 'Maildir' / name).mkdir()
    found, tally = read(tmp_path)
    assert [text.split('\n')[0] for text in found.values()] == ['Subject: 1', 'Subject: 2', 'Subject: 3']
    assert tally.skipped == {'without suffix': 1}


def test_latin1_is_read_and_counted_and_damaged_utf8_is_not(tmp_path):
    write(tmp_path, a__txt='Ärger über Straßen, ça “va”\n'.encode('cp1252') * 20_000)
    found, tally = read(tmp_path)
    assert found['a.txt'].startswith('Ärger über Straßen, ça “va”\n') and tally.latin1 == 1
    assert '1 read as Latin-1' in tally.sentence()
    for damaged in ('été'.encode() + b'\xe9 x', b'\xe9\x00', 'été'.encode('cp1252') * 70_000 + 'é'.encode()):
        write(tmp_path, a__txt=damaged)
        with pytest.raises(ValueError, match='is not UTF-8 text'):
            read(tmp_path)


def test_a_folder_of_save_to_disk_is_its_rows_and_not_its_metadata(tmp_path):
    pa = pytest.importorskip('pyarrow')
    feather = pytest.importorskip('pyarrow.feather')
    for split, texts in (('train', ['a', 'b']), ('test', ['c'])):
        write(tmp_path / split, state__json='{}', dataset_info__json='{}')
        table = pa.table({'text': texts, 'meta': [{'set': split}] * len(texts)})
        with pa.OSFile(str(tmp_path / split / 'data-00000-of-00001.arrow'), 'wb') as sink:
            with pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
    write(tmp_path, dataset_dict__json='{}')
    found, tally = read(tmp_path)
    assert list(found.values()) == ['c', 'a', 'b'] and tally.skipped == {'metadata of .arrow files': 5}
    feather.write_feather(pa.table({'text': ['d']}), tmp_path / 'e.feather', compression='lz4')
    assert list(read(tmp_path)[0].values())[0] == 'd'
    path = tmp_path / 'test' / 'data-00000-of-00001.arrow'
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match='arrow is not a complete Arrow file'):
        read(tmp_path)


def test_formats_that_are_not_read_are_refused_by_name(tmp_path, monkeypatch):
    write(tmp_path / 'a', data__arrow='x')
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    with pytest.raises(ValueError, match=r"data.arrow is read with the package pyarrow; pip install"):
        read(tmp_path / 'a')
    write(tmp_path / 'b', index__json='{}', shard__00000__mds='x')
    with pytest.raises(ValueError, match=r'b is a MosaicML streaming dataset \(.mds\), which is not read'):
        read(tmp_path / 'b')
