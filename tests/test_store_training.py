"""The training loop over a token store."""

import dataclasses
import json

import jax
import numpy as np
import pretend
import pytest
import tiny_training
from ml_collections import ConfigDict
from tiny_store import BYTES, make_store

from lct.cli.corpus import open_corpus
from lct.data.batches.memory_source import MemorySource
from lct.data.batches.store_source import StoreSource
from lct.data.corpus.store_writer import Writer
from lct.models import llama
from lct.train import loop


def test_the_loop_trains_on_a_store_and_keeps_its_state(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, 'train_step', pretend.train_step)  # the rows are under test, not the weights
    stage = dataclasses.replace(tiny_training.stage('one', 128, (1, 1, 4, 1)), num_steps=3)
    stream = StoreSource(make_store(count=40), BYTES, {'text': 1}, seed=4)
    expected = StoreSource(make_store(count=40), BYTES, {'text': 1}, seed=4)
    loop.train(loop.Run(stages=(stage,), line_every_s=0), tiny_training.CONFIG,
               lambda: llama.init(tiny_training.CONFIG, jax.random.key(0)), stream, tmp_path)
    rows = map(json.loads, (tmp_path / 'metrics' / 'metrics.jsonl').read_text().splitlines())
    assert np.isfinite([row['loss'] for row in rows]).all()
    for _ in range(6):
        expected.next_sequence(128)
    record = json.loads((tmp_path / 'checkpoints' / '3' / 'record' / 'metadata').read_text())
    assert record['cursor'] == expected.state
    assert stream.state == expected.state


def write_store(folder, memory):
    """A MemoryStore on the disk, two shards of it; documents without tokens are left out."""
    names = [f'{i}.txt' for i in range(memory.num_documents)]
    with Writer(folder, BYTES.fingerprint, BYTES.vocab_size, {}) as writer:
        for some in np.array_split(np.arange(memory.num_documents), 2):
            ends = np.cumsum(memory.lengths[some])
            documents = [(names[i], memory.sources[memory.source_of[i]], int(end))
                         for i, end in zip(some, ends)]
            writer.append(np.concatenate([memory.documents[i] for i in some]), documents)
            writer.close_shard(int(some[-1]))
        return writer.finish(memory.num_documents)


def test_a_corpus_is_a_store_or_is_tokenized_on_the_spot(tmp_path):
    memory = make_store(count=60, median=200)
    write_store(tmp_path / 'store', memory)
    config = ConfigDict({
        'corpus': str(tmp_path / 'store'), 'corpus_bytes': 10**6, 'held_out': 0.2, 'seed': 3,
        'sequences': 'joined', 'upsample': {'at_least': 100, 'keep': 0.5},
        'loss': {'seq_len': 64, 'windows': 8}, 'needle': {'lengths': (64, 128)}})
    rows, held_out = open_corpus(config, BYTES)
    assert isinstance(rows, StoreSource) and sum(map(len, held_out)) >= 2 * 8 * 64
    row = rows.next_sequence(512)
    assert (row.segment == 1).all() and len(row.segment) > 1
    texts = {ids.tobytes() for ids in memory.documents}
    assert all(ids.tobytes() in texts for ids in held_out)
    config.sequences = 'shuffled'
    message = "config.sequences 'shuffled' is not one of packed, alone, concatenated, joined"
    with pytest.raises(ValueError, match=message):
        open_corpus(config, BYTES)
    for i in range(30):
        (tmp_path / f'{i}.txt').write_text(f'document {i} ' * (i + 1))
    config.corpus = str(tmp_path / '*.txt')
    rows, held_out = open_corpus(config, BYTES)
    assert isinstance(rows, MemorySource) and 0 < len(held_out) < 30


def test_a_run_is_evaluated_on_another_corpus(tmp_path):
    for folder in ('train', 'other'):
        (tmp_path / folder).mkdir()
        for i in range(5):
            (tmp_path / folder / f'{i}.txt').write_text(f'{folder} {i} ' * 40)
    config = ConfigDict({
        'corpus': str(tmp_path / 'train'), 'evaluation_corpus': str(tmp_path / 'other'), 'held_out': 0.4,
        'seed': 3, 'loss': {'seq_len': 64, 'windows': 8}, 'needle': {'lengths': (64,)}})
    rows, found = open_corpus(config, BYTES)
    assert len(rows.document_hashes()) == 5  # nothing is held out
    assert [bytes(ids.astype(np.uint8)) for ids in found] == [f'other {i} '.encode() * 40 for i in range(5)]
    write_store(tmp_path / 'store', make_store(count=60))
    rows, found = open_corpus(ConfigDict({**config, 'corpus': str(tmp_path / 'store')}), BYTES)
    assert isinstance(rows, StoreSource) and len(found) == 5
    config.evaluation_corpus = str(tmp_path / 'store')
    with pytest.raises(ValueError, match='config.evaluation_corpus .* is a token store; give a folder'):
        open_corpus(config, BYTES)
    config.evaluation_corpus = str(tmp_path / 'absent')
    with pytest.raises(ValueError, match='config.evaluation_corpus: .*absent'):
        open_corpus(config, BYTES)


def test_a_store_on_the_disk_streams_like_one_in_memory(tmp_path):
    memory = make_store(count=60)
    kept = [i for i in range(60) if memory.lengths[i]]
    store = write_store(tmp_path / 'store', memory)
    stream = StoreSource(store, BYTES, {'books': 1, 'chat': 0}, seed=1)
    assert store.sources == tuple(dict.fromkeys(memory.sources[memory.source_of[i]] for i in kept))
    loader = stream.loader(2, 256, 'zigzag', 4, None, None)
    batch, _ = loader.next()
    loader.close()
    expected = StoreSource(store, BYTES, {'books': 1}, seed=1)
    for r in range(2):
        row = expected.next_sequence(256)
        text = [np.concatenate([[256], memory.documents[kept[d]]])[a:b]
                for d, a, b in zip(row.document, row.start, row.stop, strict=True)]
        found = np.sort(batch['tokens'][np.array([r]), slice(None)][0])
        padding = np.zeros(256 - row.counts()[0], int)
        np.testing.assert_array_equal(found, np.sort(np.concatenate([*text, padding])))
    with pytest.raises(ValueError, match='the store was made with the tokenizer'):
        other = type('Other', (), {'fingerprint': 'x' * 64, 'bos_id': None, 'vocab_size': 258})()
        StoreSource(store, other)
