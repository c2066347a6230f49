"""Drills of what is read: token ids, odd documents, damaged stores and damaged or malicious weights."""

import contextlib
import functools
import json
import os
import pathlib
import pickle
import random
import shutil
import zipfile

import numpy as np
from drill import drill, expect, flip_bit, training

FLIPS = 50  # over a store


def write_store(folder, documents, close_every=4, vocab_size=258):
    """A store of the bytes tokenizer: int arrays, a shard for every close_every of them."""
    from lct.data import tokenizer
    from lct.data.corpus.store_writer import Writer

    with Writer(folder, tokenizer.load('bytes').fingerprint, vocab_size, {}) as writer:
        for number, ids in enumerate(documents):
            writer.append(np.asarray(ids), [(f'{number}.txt', 'ab'[number % 2], len(ids))])
            if number % close_every == close_every - 1:
                writer.close_shard(number)
        return writer.finish(len(documents))


def random_documents(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, n).astype(np.int32) for n in lengths]


def refused(function, *parts):
    """The one sentence with which a function refuses its input; it must contain the parts."""
    try:
        function()
    except ValueError as error:
        sentence = str(error)
    else:
        expect(False, f'{parts} was not noticed')
    expect('\n' not in sentence and all(name in sentence for name in parts), f'{sentence!r} lacks {parts}')
    return sentence


def read_all(folder):
    """Use every file of a store."""
    from lct.data.corpus.store import Store

    store = Store(folder)
    for number in range(store.num_documents):
        store.tokens(number, 0, int(store.lengths[number]))
    return list(store.names), store.source_of.tolist()


@drill(12, 'ids outside the vocabulary: V, above V, -1, -100, int64')
def wrong_ids(folder: pathlib.Path) -> str:
    from lct.data import tokenizer
    from lct.data.batches.memory_source import MemorySource
    from lct.data.batches.sharded_loader import ShardedLoader
    from lct.data.batches.store_source import StoreSource

    bytes_tokenizer = tokenizer.load('bytes')
    wrong = [258, 300, -1, -100, 2**31, 2**40, 2**63 - 1]
    for number, value in enumerate(wrong):
        documents = [np.arange(9), np.array([1, 2, value])]
        refused(lambda d=documents: MemorySource(d, bytes_tokenizer), 'document 1', f'id {value} at 2')
        refused(lambda d=documents, n=number: write_store(folder / f'wrong{n}', d), 'token 2 of',
                "'1.txt'", f'id {value}')
    store = write_store(folder / 'large', [np.arange(200), np.full(100, 299)], vocab_size=300)
    loader = ShardedLoader(StoreSource(store, bytes_tokenizer), 1, 64, vocab_size=258)

    def batches():
        with loader:
            for _ in range(20):
                loader.next()

    sentence = refused(batches, 'of document 1', "'1.txt'", 'id 299', '0..257')
    return f'{2 * len(wrong) + 1} refused on the host with document and position: {sentence[:60]}...'


@drill(13, 'documents of 0 tokens, 1 token, beyond the context; padding rows; empty shards and evaluations')
def odd_documents(folder: pathlib.Path) -> str:
    from lct.data import tokenizer
    from lct.data.batches import packing_plan
    from lct.data.batches.store_source import StoreSource
    from lct.eval.loss.by_position import evaluation_windows

    lengths = [0, 1, 1, 0, 700, 64, 63, 65, 0, 0, 0, 0, 1, 5]  # the third shard has no token
    documents, bytes_tokenizer = random_documents(lengths), tokenizer.load('bytes')
    store = write_store(folder / 'store', documents)
    full = [ids for ids in documents if len(ids)]
    expect(store.counts['empty'] == lengths.count(0), f'{store.counts} of {lengths.count(0)} empty documents')
    expect(0 in [shard['count'] for shard in store._index['shards']], 'no shard is empty')
    expect(all(np.array_equal(store.tokens(i, 0, len(ids)), ids) for i, ids in enumerate(full)), 'other ids')
    counts = {}
    for mode in packing_plan.MODES:
        source = StoreSource(store, bytes_tokenizer, mode=getattr(packing_plan, mode))
        tokens = rows = 0
        while not rows or source.state['windows']:  # a window is an epoch of so small a store
            tokens += source.next_sequence(64).counts()[0]
            rows += 1
        wanted = sum(min(len(ids) + 1, 64) if mode == 'truncated' else len(ids) + 1 for ids in full)
        expect(tokens == wanted, f'{mode}: {tokens} tokens instead of {wanted}')
        counts[mode] = rows
        check_losses(source, counts[mode])
    refused(lambda: write_store(folder / 'empty', [np.zeros(0, np.int32)] * 3), 'holds no text')
    refused(lambda: evaluation_windows([], 64, 4, 0), 'no held-out document')
    refused(lambda: StoreSource(store, bytes_tokenizer).check_length(10**6), 'fewer than one sequence')
    return f'exact token counts and finite losses in {counts} rows; nothing to train or evaluate on is said'


@functools.cache
def loss_function():
    """A compiled function (batch) -> (loss, gradients) of a tiny model."""
    import jax

    from lct.models import llama
    from lct.ops import rope
    from lct.train.step import loss_and_grads

    config = llama.LlamaConfig(
        vocab_size=258, embed_dim=16, mlp_dim=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8,
        max_position_embeddings=64, tie_embeddings=True, rope=rope.RopeConfig(theta=1000.0))
    params = llama.init(config, jax.random.key(0))
    tables = rope.make_tables(config.rope, config.head_dim, 64)
    memory = llama.Memory(remat='none')
    return jax.jit(lambda batch: loss_and_grads(params, config, batch, tables, memory))


def check_losses(source, rows):
    """The loss of the rows that follow must be finite, and 0 where there is no target."""
    from lct.data.batches.sharded_loader import ShardedLoader

    names = ('tokens', 'targets', 'positions', 'segment_ids', 'loss_mask')
    with ShardedLoader(source, 1, 64) as loader:
        for _ in range(rows):
            batch = loader.next()[0]
            batch = {name: batch[name][np.array([0]), slice(None)][None] for name in names}
            check_loss(batch)
        for name in names:
            batch[name] = np.zeros_like(batch[name])
        check_loss(batch)


def check_loss(batch):
    import jax

    loss, grads = jax.device_get(loss_function()(batch))
    targets = int((batch['loss_mask'] > 0).sum())
    finite = all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((loss, grads)))
    expect(finite, f'the loss of {targets} targets is {loss}')
    expect(targets > 0 or loss == 0, f'the loss of no target is {loss}')


def is_other_json(path, other):
    """Whether two JSON files differ in more than their white space."""
    try:
        return json.loads(path.read_text()) != json.loads(other.read_text())
    except ValueError:
        return True


@drill(14, f'{FLIPS} flipped bits over a store; truncated, replaced, of another tokenizer')
def damaged_store(folder: pathlib.Path) -> str:
    from lct.data import tokenizer
    from lct.data.batches.store_source import StoreSource
    from lct.data.corpus.store import Store

    good, path = folder / 'good', folder / 'store'
    write_store(good, random_documents(np.random.default_rng(1).integers(20, 400, 30)))
    other = write_store(folder / 'other', random_documents(np.random.default_rng(1).integers(20, 400, 30), 1))
    expected, rng = read_all(good), random.Random(0)
    names = sorted(file.name for file in good.iterdir())
    for number in range(FLIPS):
        shutil.copytree(good, path)
        name = names[number % len(names)]
        flip_bit(path / name, rng.randrange(8 * (path / name).stat().st_size))
        if name != 'index.json' or is_other_json(path / name, good / name):
            refused(lambda: read_all(path), str(path))
        shutil.rmtree(path)
    for name in names:
        for keep in (0, 0.5):
            shutil.copytree(good, path)
            os.truncate(path / name, int(keep * (path / name).stat().st_size))
            refused(lambda: read_all(path), name)
            shutil.rmtree(path)
    shutil.copytree(good, path)
    store = Store(path)
    first = store.tokens(0, 0, 10)
    os.replace(shutil.copy(other.folder / 'shard-00000.npy', folder), path / 'shard-00000.npy')
    expect(np.array_equal(store.tokens(0, 0, 10), first), 'a replaced shard changes an open store')
    refused(lambda: read_all(path), 'shard-00000.npy differs from what was written')
    store.tokens(8, 0, 10)
    (path / 'shard-00001.npy').write_bytes((other.folder / 'shard-00001.npy').read_bytes())
    refused(lambda: [store.tokens(i, 0, 10) for i in range(9)], 'shard-00001.npy differs')
    shutil.rmtree(path)
    expect(read_all(good) == expected, 'the intact store is refused')
    stranger = type('Stranger', (), {'fingerprint': 'x' * 64, 'bos_id': None, 'vocab_size': 258})()
    refused(lambda: StoreSource(Store(good), stranger), 'was made with the tokenizer')
    StoreSource(Store(good), tokenizer.load('bytes'))
    return f'{FLIPS} flips: none silent; {2 * len(names)} truncations refused; a shard replaced is named'


@drill(14, 'a flipped bit of a shard in a training run')
def damaged_store_in_a_run(folder: pathlib.Path) -> str:
    write_store(folder / 'store', random_documents(np.random.default_rng(1).integers(20, 400, 30)))
    path = folder / 'store' / 'shard-00003.npy'
    flip_bit(path, 8 * path.stat().st_size - 100)
    end = training(folder / 'run', '--store', folder / 'store', '--steps', 40)
    lines = [line for line in end.stderr if line.strip()]
    expect(end.status == 1 and not end.weights, f'status {end.status}, {end.stdout[-1:]}')
    expect(len(lines) <= 3 and str(path) in lines[-1], f'{len(lines)} lines, the last: {lines[-1:]}')
    return f'status {end.status}, {len(lines)} line: {lines[-1]}'


@contextlib.contextmanager
def edited_header(path):
    """The JSON header of a safetensors file as a dict, which is written back as it is afterwards."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], 'little')
    header = json.loads(content[8:8 + length])
    yield header
    write_header(path, json.dumps(header).encode(), content[8 + length:])


def write_header(path, header, data):
    path.write_bytes(len(header).to_bytes(8, 'little') + header + data)


def tiny_model(folder):
    """A Hugging Face folder of two files, and the bytes of its logits' parameters."""
    import jax

    from lct.models import llama
    from lct.ops import rope
    from lct.weights import llama_hf

    config = llama.LlamaConfig(
        vocab_size=64, embed_dim=16, mlp_dim=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8,
        max_position_embeddings=64, tie_embeddings=False, rope=rope.RopeConfig(theta=1000.0))
    params = llama.init(config, jax.random.key(0))
    llama_hf.save(folder, config, params, dtype='float32', max_shard_bytes=12_000)
    return config, params


def swap_offsets(header):
    """Two tensors in one place, and a hole where one of them was."""
    first, second = [name for name in header if name != '__metadata__'][:2]
    header[second]['data_offsets'][0] = header[first]['data_offsets'][0]


MALFORMED = {  # what is done to a header, or to the folder
    'overlap': lambda header: swap_offsets(header),
    'negative offset': lambda header: next(iter(tensors_of(header)))['data_offsets'].__setitem__(0, -8),
    'huge shape': lambda header: next(iter(tensors_of(header)))['shape'].__setitem__(0, 10**300),
    'unknown dtype': lambda header: next(iter(tensors_of(header))).__setitem__('dtype', 'F12'),
    'hole': lambda header: header.pop(next(name for name in header if name != '__metadata__')),
}


def tensors_of(header):
    return (entry for name, entry in header.items() if name != '__metadata__')


@drill(18, 'damaged safetensors: flipped bits, truncated, malformed headers, odd index, missing shards')
def damaged_safetensors(folder: pathlib.Path) -> str:
    from lct.weights import llama_hf, manifest

    good, path = folder / 'good', folder / 'model'
    tiny_model(good)
    files, rng = sorted(file.name for file in good.glob('model-*')), random.Random(0)

    def attempt(name, change, *parts):
        shutil.copytree(good, path)
        change(path / name)
        refused(lambda: llama_hf.load(path), *parts)
        shutil.rmtree(path)

    def without_manifest(change):
        def changed(file):
            (path / manifest.NAME).unlink()
            change(file)
        return changed

    def rewrite(edit):
        def changed(file):
            with edited_header(file) as header:
                edit(header)
        return changed

    for name in files:
        for _ in range(10):
            attempt(name, lambda f: flip_bit(f, rng.randrange(8 * f.stat().st_size)), str(path / name))
        for keep in (0, 9, 100, -1):
            attempt(name, without_manifest(lambda f, n=keep: os.truncate(f, n % f.stat().st_size)), name)
        attempt(name, lambda f: f.unlink(), 'is missing')
        attempt(name, without_manifest(lambda f: write_header(f, b'{' * 2**20, b'')), 'not valid JSON')
        attempt(name, without_manifest(lambda f: f.write_bytes(b'\x7f' * 99)), 'header length')
        attempt(name, without_manifest(lambda f: write_header(f, b'{"a": 1, "a": 2}', b'')), 'twice')
        for edit in MALFORMED.values():
            attempt(name, without_manifest(rewrite(edit)), name)
    for target in ('../good/' + files[0], '/etc/passwd', 'a\\b.safetensors', ''):
        def traverse(file, target=target):
            index = json.loads(file.read_text())
            index['weight_map'] = dict.fromkeys(index['weight_map'], target)
            file.write_text(json.dumps(index))
        attempt('model.safetensors.index.json', traverse, 'without a path')
    shutil.copytree(good, path)
    shutil.copy(path / files[0], path / 'model-00099-of-00099.safetensors')  # a stray shard is not read
    llama_hf.load(path)
    return f'{len(files)} files: 10 flips each, none silent; {4 + 4 + len(MALFORMED)} malformations each'


class Malicious:
    def __reduce__(self):
        return os.system, (f'touch {self.target}',)


@drill(19, 'a malicious pickle in a .pth')
def malicious_pickle(folder: pathlib.Path) -> str:
    from lct.weights import torch_files

    sentences = []
    for protocol in range(6):
        Malicious.target = folder / 'executed'
        path = folder / f'consolidated.{protocol:02d}.pth'
        with zipfile.ZipFile(path, 'w') as archive:
            archive.writestr('archive/data.pkl', pickle.dumps({'w': Malicious()}, protocol))
            archive.writestr('archive/byteorder', 'little')
        sentences.append(refused(lambda p=path: torch_files.read_header(p), path.name))
    path.write_bytes(pickle.dumps({'w': Malicious()}))  # no archive, as of old versions of PyTorch
    refused(lambda: torch_files.read_header(path), 'is not a zip archive')
    expect(not Malicious.target.exists(), 'the pickle was executed')
    named = [sentence for sentence in sentences if 'posix system' in sentence]
    expect(named, f'the call is not named: {sentences[0]}')
    return f'nothing executed; {named[0][named[0].index("calls"):]}'
