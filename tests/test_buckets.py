"""Models, corpora, stores and work directories in an object store: fsspec's in memory stands for one."""

import json
import os
import shutil
import time

import fsspec
import numpy as np
import pytest

from lct import bucket_cache, mirror, storage, upload
from lct.cli import model as cli_model
from lct.data.corpus import documents
from lct.data.corpus.store import Store, is_store
from lct.data.corpus.store_writer import Writer
from lct.train import checkpoint

URL = 'memory://bucket/place'


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty store and an empty cache."""
    fsspec.filesystem('memory').store.clear()
    monkeypatch.setenv('LCT_CACHE_DIR', str(tmp_path / 'cache'))
    monkeypatch.setenv('LCT_SYNC_S', '3600')  # at the end alone
    return tmp_path / 'cache'


def put(**contents):
    """Write objects below URL; '__' in a keyword is a slash, '_' a dot."""
    for name, content in contents.items():
        storage.Remote(URL).write(name.replace('__', '/').replace('_', '.'), content)


def objects():
    return {name for name in storage.Remote(URL).list() if name != mirror.OWNER}


def names_below(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob('*') if path.is_file()}


# ---------------------------------------------------------------------------------------------------
# What is read
# ---------------------------------------------------------------------------------------------------


def test_a_corpus_reads_as_from_a_local_folder(tmp_path):
    put(web__b_txt=b'bee', web__a_md=b'ay', books__c_txt=b'sea', books__d_png=b'no text')
    local = tmp_path / 'place'
    shutil.copytree(bucket_cache.fetch(URL), local)
    assert documents.read(URL) == documents.read(local) != []
    assert [one.name for one in documents.read(f'{URL}/**/*.txt')] == ['books/c.txt', 'web/b.txt']
    assert [one.name for one in documents.read(f'mine={URL}/web')] == ['mine/a.md', 'mine/b.txt']
    assert documents.read(f'{URL}/web/a.md')[0].text == 'ay'


def test_a_copy_is_made_once_and_again_when_the_object_changes():
    put(a_txt=b'one')
    first = bucket_cache.fetch(URL)
    inode = (first / 'a.txt').stat().st_ino
    assert (bucket_cache.fetch(URL) / 'a.txt').stat().st_ino == inode
    put(a_txt=b'two')
    assert (bucket_cache.fetch(URL) / 'a.txt').read_bytes() == b'two'


def test_a_copy_that_was_cut_short_is_made_again():
    put(a_txt=b'one')
    path = bucket_cache.fetch(URL) / 'a.txt'
    path.write_bytes(b'o')
    assert (bucket_cache.fetch(URL) / 'a.txt').read_bytes() == b'one'


def test_a_download_of_other_bytes_is_refused(tmp_path):
    put(a_txt=b'one')
    remote = storage.Remote(URL)
    info = remote.list()['a.txt']
    with pytest.raises(storage.StorageError, match=r'a\.txt .*3 bytes came instead of 4'):
        remote.get('a.txt', tmp_path / 'a', info._replace(size=4))
    with pytest.raises(storage.StorageError, match='another md5'):
        remote.get('a.txt', tmp_path / 'a', info._replace(md5=b'0' * 16))


def test_copies_stay_within_the_bound(monkeypatch):
    monkeypatch.setenv('LCT_CACHE_GB', str(25e-9))
    put(a=bytes(10), b=bytes(10), c=bytes(10))
    folder, paths = bucket_cache.RemoteFolder(URL), []
    for name in 'abac':  # a is used after b
        paths.append(folder.path(name))
        os.utime(paths[-1].parent.with_suffix('.json'), (len(paths), len(paths)))
    a, b, _, c = paths
    assert a.exists() and c.exists() and not b.exists()
    held = bucket_cache.fetch(f'{URL}/a')
    with pytest.raises(storage.StorageError, match='raise LCT_CACHE_GB'):
        bucket_cache.fetch(URL)
    assert held.exists() and not c.exists()


def test_variables_that_are_no_numbers_above_0_are_refused(monkeypatch):
    put(a_txt=b'one')
    for text in ('0', '-1', 'nan', '10 GB'):
        monkeypatch.setenv('LCT_CACHE_GB', text)
        with pytest.raises(ValueError, match=f'^LCT_CACHE_GB={text} must be a number of gigabytes above 0'):
            bucket_cache.fetch(URL)
        monkeypatch.setenv('LCT_SYNC_S', text)
        with pytest.raises(ValueError, match=f'^LCT_SYNC_S={text} must be a number of seconds above 0'):
            mirror.Mirror(URL, print)


def test_a_name_that_leaves_the_folder_is_refused():
    put(a=b'1')
    stored = fsspec.filesystem('memory').store
    stored['/bucket/place/../../b'] = stored['/bucket/place/a']
    with pytest.raises(storage.StorageError, match=r"object '\.\./\.\./b', which is not the name of a file"):
        bucket_cache.fetch(URL)


def test_nothing_under_a_url_is_an_error():
    with pytest.raises(storage.StorageError, match='memory://bucket/place does not exist'):
        cli_model.find_model(URL)
    with pytest.raises(ValueError, match=r'the scheme https://, which is not supported; .* such as s3://'):
        storage.check_scheme('https://example.com/a')


def test_a_store_copies_the_shards_that_are_read(tmp_path, cache):
    with Writer(tmp_path / 'store', 'hash', 256, {}) as writer:
        for number in range(4):
            writer.append(np.full(1000, number), [(f'document {number}', 'all', 1000)])
            writer.close_shard(number)
        local = writer.finish(4)
    upload.upload(tmp_path / 'store', storage.Remote(URL))
    assert is_store(URL) and not is_store(URL + '/none')
    store = Store(URL)
    assert store.fingerprint == local.fingerprint and list(store.names) == list(local.names)
    assert np.array_equal(store.tokens(2, 10, 20), local.tokens(2, 10, 20))
    shards = list(cache.glob('objects/*/shard-*.npy'))
    assert [path.name for path in shards] == ['shard-00002.npy']
    shards[0].write_bytes(b'\1' * shards[0].stat().st_size)
    with pytest.raises(ValueError, match='another crc32'):
        Store(URL).tokens(2, 10, 20)


# ---------------------------------------------------------------------------------------------------
# A work directory
# ---------------------------------------------------------------------------------------------------


def run(content):
    """A run that writes a checkpoint, a row and what is not for others."""
    with mirror.mirrored(URL) as folder:
        before = names_below(folder)
        (folder / 'checkpoints' / content).mkdir(parents=True)
        (folder / 'checkpoints' / content / 'state').write_text(content)
        (folder / 'checkpoints' / '9.orbax-checkpoint-tmp-1').mkdir(exist_ok=True)
        (folder / 'checkpoints' / '9.orbax-checkpoint-tmp-1' / 'state').write_text('incomplete')
        with (folder / 'metrics.jsonl').open('a') as file:
            file.write(content + '\n')
        (folder / 'lock').touch()
        (folder / 'results.json.part').touch()
    return before


WRITTEN = {'checkpoints/1/state', 'metrics.jsonl'}


def test_a_run_continues_on_another_machine(cache):
    assert run('1') == set()
    assert objects() == {*WRITTEN, 'checkpoints/1.commit.json'}
    shutil.rmtree(cache)
    assert run('2') == WRITTEN
    assert storage.Remote(URL).read('metrics.jsonl') == b'1\n2\n'


def test_a_checkpoint_without_its_commit_does_not_count(cache):
    run('1')
    put(checkpoints__2__state=b'cut sho')
    shutil.rmtree(cache)
    with mirror.mirrored(URL) as folder:
        assert names_below(folder) == WRITTEN
    assert objects() == {*WRITTEN, 'checkpoints/1.commit.json'}


def test_what_is_not_of_a_run_is_never_deleted(cache):
    put(model__config_json=b'{}')
    with pytest.raises(ValueError, match='memory://bucket/place is not empty, and no run has uploaded to it'):
        run('1')
    assert objects() == {'model/config.json'}
    storage.Remote(URL).remove(['model/config.json'])
    run('1')
    with mirror.mirrored(URL + '/evaluation') as folder:
        (folder / 'results.json').touch()
    run('2')  # which finds its local folder
    shutil.rmtree(cache)
    run('3')
    assert 'evaluation/results.json' in objects()


def test_a_damaged_checkpoint_is_refused(cache):
    run('1')
    put(checkpoints__1__state=b'2')
    shutil.rmtree(cache)
    with pytest.raises(storage.StorageError, match=r'delete the object checkpoints/1\.commit\.json'):
        run('2')


def test_the_only_checkpoint_goes_when_the_next_one_counts(monkeypatch):
    run('1')

    def replace(self, path, name):
        if name == 'state':
            raise storage.StorageError('no network')

    with pytest.raises(storage.StorageError):
        with mirror.mirrored(URL) as folder:
            (folder / 'checkpoints' / '1').rename(folder / 'checkpoints' / '2')
            monkeypatch.setattr(storage.Remote, 'put', replace)
    assert {'checkpoints/1.commit.json', 'checkpoints/1/state'} <= objects()


def test_what_a_run_deletes_is_deleted_and_its_commit_first():
    run('1')
    removed, remove = [], storage.Remote.remove
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage.Remote, 'remove', lambda self, names: removed.extend(names := list(names))
                      or remove(self, names))
        with mirror.mirrored(URL) as folder:
            shutil.rmtree(folder / 'checkpoints')
            (folder / 'metrics.jsonl').unlink()
    assert objects() == set()
    assert removed.index('checkpoints/1.commit.json') < removed.index('state')


def test_a_killed_run_continues_from_its_local_folder_unless_another_went_on(cache, tmp_path):
    run('1')
    killed = mirror.Mirror(URL, print)
    folder = killed.open()
    (folder / 'metrics.jsonl').write_text('1\nnot uploaded\n')
    abandon(killed)
    shutil.copytree(cache, tmp_path / 'first machine')
    with mirror.mirrored(URL) as folder:
        assert (folder / 'metrics.jsonl').read_text() == '1\nnot uploaded\n'
    shutil.rmtree(cache)
    run('2')
    shutil.rmtree(cache)
    (tmp_path / 'first machine').rename(cache)
    with mirror.mirrored(URL) as folder:
        assert (folder / 'metrics.jsonl').read_text() == '1\nnot uploaded\n2\n'


def abandon(killed):
    """What a kill leaves."""
    killed._stop.set()
    killed._released.set()
    bucket_cache.release(killed._entry.with_suffix('.lock'))


def test_two_processes_cannot_run_at_once(cache, monkeypatch):
    monkeypatch.setattr(mirror, 'LOST_AFTER_S', 0.2)
    lines = []
    with mirror.mirrored(URL):
        with pytest.raises(ValueError, match='another process runs in memory://bucket/place'):
            mirror.Mirror(URL, print).open()
    owner = {'id': 'a', 'host': 'elsewhere', 'pid': 1}
    monkeypatch.setattr(time, 'sleep', lambda _: storage.Remote(URL).write(
        mirror.OWNER, json.dumps({**owner, 'beat': 2}).encode()))
    storage.Remote(URL).write(mirror.OWNER, json.dumps({**owner, 'beat': 1}).encode())
    with pytest.raises(ValueError, match='another process runs'):
        mirror.Mirror(URL, lines.append).open()
    assert 'process 1 of elsewhere' in lines[0]


def test_a_lost_process_on_another_machine_is_replaced(monkeypatch):
    monkeypatch.setattr(mirror, 'LOST_AFTER_S', 0.1)
    storage.Remote(URL).write(mirror.OWNER, json.dumps({'id': 'a', 'host': 'elsewhere', 'pid': 1}).encode())
    assert run('1') == set()


def test_a_process_whose_work_directory_was_taken_over_uploads_nothing_and_stops(monkeypatch):
    signals = []
    monkeypatch.setattr(os, 'kill', lambda pid, number: signals.append(pid))
    with pytest.raises(ValueError, match='another process took memory://bucket/place over'):
        with mirror.mirrored(URL) as folder:
            storage.Remote(URL).write(mirror.OWNER, b'{"id": "other"}')
            (folder / 'results.json').touch()
    assert objects() == set() and signals == [os.getpid()]


def test_checkpoints_that_orbax_writes_to_the_bucket_are_left_to_it(monkeypatch):
    monkeypatch.setattr(mirror, 'DIRECT', ('memory',))
    with mirror.mirrored(URL) as folder:
        (folder / 'gates.json').touch()
    put(checkpoints__3__state=b'orbax', model__config_json=b'{}')
    with mirror.mirrored(URL) as folder:
        assert storage.elsewhere(folder / 'checkpoints') == f'{URL}/checkpoints'
        assert names_below(folder) == {'gates.json', 'checkpoints.url'}
        other = mirror.copy(URL, 1)  # of another process, perhaps on another host
        assert names_below(other) == {'gates.json', 'checkpoints.url'} and other != folder
    assert objects() == {'checkpoints/3/state', 'gates.json', 'checkpoints.url'}


def test_the_folder_of_checkpoints_is_where_the_file_beside_it_says(tmp_path):
    assert checkpoint.located(tmp_path / 'checkpoints') == tmp_path / 'checkpoints'
    (tmp_path / 'checkpoints.url').write_text('gs://bucket/run/checkpoints\n')
    assert str(checkpoint.located(tmp_path / 'checkpoints') / '3') == 'gs://bucket/run/checkpoints/3'


def test_an_upload_that_fails_keeps_the_local_folder(monkeypatch):
    def fail(self, path, name):
        raise storage.StorageError('no network')

    with pytest.MonkeyPatch.context() as patch:
        with pytest.raises(storage.StorageError, match='no network; .* holds what is not uploaded'):
            with mirror.mirrored(URL) as folder:
                (folder / 'results.json').write_text('{}')
                patch.setattr(storage.Remote, 'put', fail)
    monkeypatch.setenv('LCT_CACHE_GB', str(1e-9))
    put(a=b'')
    with pytest.raises(storage.StorageError, match='raise LCT_CACHE_GB'):  # there is no room to be made
        bucket_cache.fetch(f'{URL}/a')
    with mirror.mirrored(URL) as folder:
        assert (folder / 'results.json').exists()
    assert 'results.json' in objects()


# ---------------------------------------------------------------------------------------------------
# New folders
# ---------------------------------------------------------------------------------------------------


def write(folder, number):
    folder.mkdir(exist_ok=True)
    for name in ('config.json', 'a.safetensors', 'tokenizer.json'):
        (folder / name).write_text(f'{number}')


def test_a_new_folder_is_complete_or_no_model(monkeypatch):
    put_file, order = storage.Remote.put, []

    def put_or_fail(self, path, name):
        order.append(name)
        if name == failing:
            raise storage.StorageError('no network')
        put_file(self, path, name)

    monkeypatch.setattr(storage.Remote, 'put', put_or_fail)
    failing = 'tokenizer.json'
    with pytest.raises(storage.StorageError, match='no network'):
        with upload.new_folder(URL) as folder:
            write(folder, 1)
    assert 'config.json' not in objects()
    failing = ''
    with upload.new_folder(URL) as folder:
        write(folder, 2)
    assert order[-1] == 'config.json' and not folder.exists()
    assert objects() == {'config.json', 'a.safetensors', 'tokenizer.json'}
    with pytest.raises(ValueError, match='memory://bucket/place exists; remove it'):
        with upload.new_folder(URL):
            raise AssertionError
    failing = 'tokenizer.json'  # of a model that is there: what is left of it is no model either
    with pytest.raises(storage.StorageError):
        with upload.new_folder(URL, overwrite=True) as folder:
            write(folder, 3)
    assert 'config.json' not in objects()


def test_a_new_folder_deletes_nothing_that_it_does_not_replace():
    put(data__a_txt=b'a', old_safetensors=b'')
    with pytest.raises(ValueError, match='memory://bucket/place exists; remove it'):
        with upload.new_folder(URL):
            raise AssertionError
    with upload.new_folder(URL, overwrite=True) as folder:
        write(folder, 1)
    assert objects() == {'config.json', 'a.safetensors', 'tokenizer.json', 'data/a.txt'}


def test_a_new_folder_that_was_interrupted_continues_under_its_key():
    for key, expected in (('a', False), ('a', True), ('b', False), ('', False), ('', False)):
        with pytest.raises(KeyboardInterrupt):
            with upload.new_folder(URL, key=key) as folder:
                assert (folder / 'part').exists() == expected
                folder.mkdir(exist_ok=True)
                (folder / 'part').touch()
                raise KeyboardInterrupt
    assert objects() == set()


def test_a_local_folder_is_written_where_it_is(tmp_path):
    with upload.new_folder(tmp_path / 'model') as folder:
        assert folder == tmp_path / 'model' and not folder.exists()
