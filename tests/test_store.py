import errno
import json
import os
import pickle

import numpy as np
import pytest

from lct.data.corpus import store_writer
from lct.data.corpus.index import fingerprint_of
from lct.data.corpus.shards import sha256_of
from lct.data.corpus.store import Store
from lct.data.corpus.store_writer import Writer

NUM = 40


def corpus(vocab_size=300, seed=0):
    """[(name, source, ids)]: some documents empty, some of one token, some longer than a shard."""
    rng = np.random.default_rng(seed)
    lengths = [0, 1, 250, *rng.integers(0, 30, NUM - 4), 0]
    return [(f'döc {i}', 'ab'[i % 2], rng.integers(0, vocab_size, n).astype(np.int32))
            for i, n in enumerate(lengths)]


def write(folder, documents, vocab_size=300, shard_tokens=60, tokenizer_hash='t', finish=True):
    """The documents as a store, 17 tokens at a time; continues one that was stopped."""
    ids = np.concatenate([ids for _, _, ids in documents])
    ends = np.cumsum([len(ids) for _, _, ids in documents])
    writer = Writer(folder, tokenizer_hash, vocab_size, {'seed': 0})
    try:
        at = writer.cursor or 0
        written = sum(ends <= at) if writer.cursor else 0
        while at < len(ids) or written < len(ends):
            stop = min(at + 17, len(ids))
            inside = [i for i in range(written, len(ends)) if ends[i] <= stop]
            writer.append(ids[at:stop], [(*documents[i][:2], ends[i] - at) for i in inside])
            at, written = stop, written + len(inside)
            if writer.shard_tokens >= shard_tokens:
                writer.close_shard(int(at))
        return writer.finish(int(at)) if finish else None
    finally:
        writer._lock.close()  # as the system does when a process ends, without any cleanup


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize('vocab_size, dtype', [(2**16, '<u2'), (2**16 + 1, '<i4')])
def test_documents_are_read_in_any_range(tmp_path, vocab_size, dtype):
    documents = corpus(vocab_size)
    store = write(tmp_path / 's', documents, vocab_size)
    full = [(name, source, ids) for name, source, ids in documents if len(ids)]
    assert store.counts == {'empty': NUM - len(full), 'bad': 0, 'inexact_cuts': 0}
    assert list(store.names) == [name for name, _, _ in full] and len(store.names) == store.num_documents
    assert [store.sources[i] for i in store.source_of] == [source for _, source, _ in full]
    np.testing.assert_array_equal(store.lengths, [len(ids) for _, _, ids in full])
    assert store.lengths.dtype == np.int64 and store.source_of.dtype == np.int32
    rng = np.random.default_rng(1)
    for number, (_, _, ids) in enumerate(full):
        for start, stop in [(0, len(ids)), *np.sort(rng.integers(0, len(ids) + 1, (9, 2)), axis=1).tolist()]:
            got = store.tokens(number, start, stop)
            assert got.dtype == np.int32
            np.testing.assert_array_equal(got, ids[start:stop])
    # Any reader of .npy reads the same stream; the longest document lies in several shards.
    shards = [np.load(path) for path in sorted((tmp_path / 's').glob('shard-*.npy'))]
    assert len(shards) > 5 and {shard.dtype.str for shard in shards} == {dtype} and len(shards[0]) < 250
    np.testing.assert_array_equal(np.concatenate(shards), np.concatenate([ids for _, _, ids in full]))
    again = pickle.loads(pickle.dumps(store))
    assert again.fingerprint == store.fingerprint and list(again.names) == list(store.names)
    calls = []
    again.verify(lambda *bytes_done: calls.append(bytes_done))
    assert calls[-1][0] == calls[-1][1] == sum(map(len, contents(tmp_path / 's').values())) - os.path.getsize(
        tmp_path / 's' / 'index.json')


def test_stopped_at_any_rename_it_continues_to_the_same_bytes(tmp_path, monkeypatch):
    documents = corpus()
    whole = contents(write(tmp_path / 'whole', documents).folder)
    monkeypatch.setattr(store_writer.os, 'fsync', lambda file: None)  # there are thousands of them here
    replace = os.replace
    stops = 0
    while True:
        left = [stops]

        def stop(source, target, left=left):
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            replace(source, target)

        monkeypatch.setattr(store_writer.os, 'replace', stop)
        folder = tmp_path / f'stopped{stops}'
        try:
            write(folder, documents)
            break
        except KeyboardInterrupt:
            assert not folder.exists()
        monkeypatch.setattr(store_writer.os, 'replace', replace)
        assert contents(write(folder, documents).folder) == whole
        assert not folder.with_name(folder.name + '.partial').exists()
        stops += 1
    assert stops > 20  # three renames a shard, one a table


def test_another_tokenizer_plan_or_process_is_refused(tmp_path):
    folder = tmp_path / 's'
    write(folder, corpus(), finish=False)
    with pytest.raises(ValueError, match="with tokenizer 't', and this run has 'other'; a store has one"):
        write(folder, corpus(), tokenizer_hash='other')
    with pytest.raises(ValueError, match='begun with vocab_size 300, and this run has 301'):
        write(folder, corpus(), vocab_size=301)
    with Writer(folder, 't', 300, {'seed': 0}), pytest.raises(ValueError, match='another process is writing'):
        Writer(folder, 't', 300, {'seed': 0})
    write(folder, corpus())
    with pytest.raises(ValueError, match='s exists; remove it or give another name'):
        write(folder, corpus())


def test_a_corpus_without_text_and_a_wrong_vocabulary_are_refused(tmp_path):
    with pytest.raises(ValueError, match='holds no text; it had 1 empty documents'):
        write(tmp_path / 'empty', [('a', 'a', np.zeros(0, np.int32))])
    for wrong in (300, 301, -1, -100, 2**63 - 1):
        message = f"token 1 of document 'b' has id {wrong}, which is not in the vocabulary of 300"
        with pytest.raises(ValueError, match=message):
            write(tmp_path / 'large', [('a', 'a', np.array([0])), ('b', 'a', np.array([1, wrong]))])
    one = write(tmp_path / 'one', [('a', 'a', np.array([7]))])
    assert one.tokens(0, 0, 1).tolist() == [7] and one.tokens(0, 1, 1).tolist() == []
    assert not (tmp_path / 'empty').exists() and not (tmp_path / 'large').exists()


def change_index(folder, **values):
    index = json.loads((folder / 'index.json').read_text()) | values
    (folder / 'index.json').write_text(json.dumps({**index, 'sha256': fingerprint_of(index)}))


def flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize('damage, message', [
    (lambda s: (s / 'shard-00001.npy').write_bytes((s / 'shard-00001.npy').read_bytes()[:-1]),
     r'shard-00001.npy has \d+ bytes where \d+ were written; copy it again'),
    (lambda s: (s / 'shard-00002.npy').unlink(), 'shard-00002.npy is missing'),
    (lambda s: (s / 'lengths.npy').write_bytes(b''), 'lengths.npy has 0 bytes'),
    (lambda s: change_index(s, version=3),
     'is a token store of version 3, and this release reads versions 1 and 2'),
    (lambda s: change_index(s, format='other'), 'is not the index of a token store'),
    (lambda s: change_index(s, num_documents=-1), 'index.json has an invalid num_documents -1; tokenize'),
    (lambda s: change_index(s, num_tokens=10**4000), 'has an invalid num_tokens with too many digits'),
    (lambda s: change_index(s, num_tokens=1), 'has shards that do not hold num_tokens 1 in total'),
    (lambda s: change_index(s, vocab_size=True), 'has an invalid vocab_size True'),
    (lambda s: change_index(s, vocab_size=2**17), r'gives shards \d+ bytes, which are not a header and'),
    (lambda s: change_index(s, sources='ab'), "has an invalid sources 'ab'"),
    (lambda s: change_index(s, sources=['a', 'a']), 'names a source twice'),
    (lambda s: change_index(s, counts={}), "lacks the field 'empty'"),
    (lambda s: change_index(s, tables={}), "lacks the field 'offsets'"),
    (lambda s: change_index(s, shards=[7]), 'has an entry 7 in shards, which is not an object'),
    (lambda s: change_index(s, chunk_bytes=0), 'has an invalid chunk_bytes 0'),
    (lambda s: (s / 'index.json').write_text('[' * 10**6), 'is not valid JSON'),
    (lambda s: (s / 'index.json').write_text(
        (s / 'index.json').read_text().replace('"vocab_size": 300', '"vocab_size": 301')),
     'index.json differs from what was written'),
    (lambda s: (s / 'index.json').write_text('{'), 'is not valid JSON'),
    (lambda s: (s / 'index.json').unlink(), 'is not a token store: it has no index.json'),
])
def test_a_damaged_store_is_not_opened(tmp_path, damage, message):
    write(tmp_path / 's', corpus())
    damage(tmp_path / 's')
    with pytest.raises(ValueError, match=message):
        Store(tmp_path / 's')


@pytest.mark.parametrize('name', ['shard-00003.npy', 'names.npy', 'source_of.npy'])
def test_verify_names_the_altered_file(tmp_path, name):
    store = write(tmp_path / 's', corpus())
    store.verify()
    flip(tmp_path / 's' / name)
    with pytest.raises(ValueError, match=f'{name} differs from what was written'):
        Store(tmp_path / 's').verify()


def test_a_shard_of_another_type_and_tokens_that_are_not_there(tmp_path):
    store = write(tmp_path / 's', corpus())
    for document, start, stop in [
            (-1, 0, 1), (store.num_documents, 0, 0), (1, 0, 251), (1, 3, 2), (1, -1, 2)]:
        with pytest.raises(ValueError, match=f'tokens {start} to {stop} of document {document}: '):
            store.tokens(document, start, stop)
    path = tmp_path / 's' / 'shard-00000.npy'
    np.save(path, np.load(path).astype('<i2'))  # as many bytes
    with pytest.raises(ValueError, match='shard-00000.npy differs from what was written'):
        Store(tmp_path / 's').tokens(0, 0, 1)


def read_all(store):
    return [store.tokens(i, 0, int(store.lengths[i])).tolist() for i in range(store.num_documents)]


def test_every_read_is_verified_and_costs_one_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(store_writer, 'CHUNK', 512)
    rng = np.random.default_rng(0)
    documents = [(str(i), 'a', rng.integers(0, 300, 1000).astype(np.int32)) for i in range(8)]
    store = write(tmp_path / 's', documents, shard_tokens=3000)
    assert read_all(store) == [ids.tolist() for _, _, ids in documents]
    reads = []
    monkeypatch.setattr(os, 'pread', lambda fd, n, at, pread=os.pread: reads.append(n) or pread(fd, n, at))
    store.tokens(1, 10, 20)
    assert reads == [512]
    monkeypatch.undo()
    path = tmp_path / 's' / 'shard-00001.npy'
    content = path.read_bytes()
    path.write_bytes(content[:700] + bytes([content[700] ^ 4]) + content[701:])  # while the store is open
    number = int(np.searchsorted(np.cumsum(store.lengths), store._index['shards'][0]['count'], side='right'))
    with pytest.raises(ValueError, match=r'shard-00001.npy differs from what was written \(another crc32 of '
                                         r'chunk 1\); copy it again'):
        store.tokens(number, 0, 1000)
    assert store.tokens(0, 0, 1000).tolist() == documents[0][2].tolist()  # an intact part
    path.write_bytes(content[:-2])
    with pytest.raises(ValueError, match='shard-00001.npy differs from what was written'):
        read_all(store)
    path.write_bytes(content)
    assert read_all(store) == [ids.tolist() for _, _, ids in documents]


def test_a_shard_that_cannot_be_read_for_a_while(tmp_path, monkeypatch):
    store = write(tmp_path / 's', corpus())
    expected = store.tokens(1, 0, 250).tolist()

    def stale(*args):
        raise OSError(errno.ESTALE, 'Stale file handle')

    with monkeypatch.context() as patch:
        patch.setattr(os, 'pread', stale)
        with pytest.raises(OSError, match='Stale'):
            store.tokens(1, 0, 250)
    os.rename(tmp_path / 's', tmp_path / 'away')
    with pytest.raises(FileNotFoundError, match='shard-0000'):  # not the file that was open
        store.tokens(1, 0, 250)
    os.rename(tmp_path / 'away', tmp_path / 's')
    assert store.tokens(1, 0, 250).tolist() == expected


@pytest.mark.parametrize('name, use', [
    ('lengths', lambda s: s.lengths), ('source_of', lambda s: s.source_of), ('names', lambda s: s.names[0]),
    ('name_offsets', lambda s: s.names[0]), ('offsets', read_all), ('crc32s', read_all)])
def test_a_table_is_verified_at_its_first_use(tmp_path, name, use):
    write(tmp_path / 's', corpus())
    flip(tmp_path / 's' / f'{name}.npy')
    store = Store(tmp_path / 's')
    with pytest.raises(ValueError, match=f'{name}.npy differs from what was written'):
        use(store)


def as_version_1(folder):
    """Turn a store into what the first release wrote."""
    index = json.loads((folder / 'index.json').read_text())
    del index['tables']['crc32s'], index['chunk_bytes']
    (folder / 'crc32s.npy').unlink()
    index['version'] = 1
    (folder / 'index.json').write_text(json.dumps({**index, 'sha256': fingerprint_of(index)}))


def test_the_shards_of_version_1_are_verified_whole(tmp_path):
    expected = read_all(write(tmp_path / 's', corpus()))
    as_version_1(tmp_path / 's')
    store = Store(tmp_path / 's')
    assert read_all(store) == expected
    path = tmp_path / 's' / 'shard-00001.npy'
    intact = path.read_bytes()
    flip(path)
    for opened in (store, Store(tmp_path / 's')):  # one of them had read the shard
        with pytest.raises(ValueError, match=r'shard-00001.npy differs .* \(another sha256\)'):
            read_all(opened)
    path.write_bytes(intact)
    assert read_all(store) == expected


@pytest.mark.parametrize('name, change, message', [
    ('lengths', lambda x: x * 2, r'lengths.npy has numbers that do not add up to \d+ tokens'),
    ('offsets', lambda x: x[::-1], 'offsets.npy has numbers that contradict lengths.npy'),
    ('source_of', lambda x: x + 9, 'source_of.npy has numbers that are not all below 2'),
    ('name_offsets', lambda x: x[::-1], 'name_offsets.npy has numbers that do not ascend'),
])
def test_tables_that_contradict_each_other(tmp_path, name, change, message):
    write(tmp_path / 's', corpus())
    path = tmp_path / 's' / f'{name}.npy'
    np.save(path, change(np.load(path)))
    index = json.loads((tmp_path / 's' / 'index.json').read_text())
    index['tables'][name]['sha256'] = sha256_of(path)
    change_index(tmp_path / 's', **index)
    store = Store(tmp_path / 's')
    with pytest.raises(ValueError, match=message):
        store.names, store.source_of, read_all(store)


@pytest.mark.parametrize('name', ['00000.json', '00001.npz'])
def test_a_store_is_not_continued_over_a_flipped_bit(tmp_path, name):
    documents = corpus()
    write(tmp_path / 's', documents, finish=False)
    path = tmp_path / 's.partial' / name
    content = path.read_bytes()
    for at in np.random.default_rng(0).integers(0, len(content), 20):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1:])
        with pytest.raises(ValueError, match=f'{name} .*; remove .* to begin anew'):
            write(tmp_path / 's', documents)
    path.write_bytes(content)
    write(tmp_path / 's', documents)


def test_the_fingerprint_follows_the_tokens(tmp_path):
    prints = {write(tmp_path / str(seed), corpus(seed=seed)).fingerprint for seed in range(3)}
    assert len(prints) == 3
    assert write(tmp_path / 'again', corpus(seed=0)).fingerprint in prints
