"""The costs of the input pipeline: padding, bytes read by each host, time to the first batch, waiting.

    python experiments/bench/bench_data.py --output experiments/results/data.json

Documents have log-normal lengths with a long tail (median 1,000 tokens, sigma 1.3, one in a thousand of a
book's length). Padding and bytes read are counted over a synthetic store, which computes its tokens. The time
to the first batch is measured over stores on disk whose shards are sparse files. Waiting is measured in the
laptop job on the standard library, tokenized into a store.
"""

import argparse
import functools
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time
import zlib

import numpy as np

HERE = pathlib.Path(__file__).resolve().parents[1]
LAYOUTS = ('contiguous', 'zigzag', 'striped')
FIRST_BATCH = """
import json, sys, time
from lct.data import tokenizer
from lct.data.corpus import store
from lct.data.batches.sharded_loader import ShardedLoader
from lct.data.batches.store_source import StoreSource
bytes_tokenizer = tokenizer.load('bytes')
start = time.perf_counter()
source = StoreSource(store.Store(sys.argv[1]), bytes_tokenizer, json.loads(sys.argv[3]))
source.check_length(int(sys.argv[2]))
with ShardedLoader(source, 1, int(sys.argv[2]), 'zigzag', 8) as loader:
    loader.next()
    print(time.perf_counter() - start)
"""


class SyntheticStore:
    """A store of documents of given lengths whose tokens are computed on access."""

    def __init__(self, lengths, tokenizer):
        self.lengths, self.num_documents, self.num_tokens = lengths, len(lengths), int(lengths.sum())
        self.sources, self.source_of = ('all',), np.zeros(len(lengths), np.int32)
        self.tokenizer_hash, self.vocab_size = tokenizer.fingerprint, tokenizer.vocab_size
        self.fingerprint = 'synthetic'

    def tokens(self, document, start, stop):
        return np.arange(start, stop, dtype=np.int32) % 251


def lognormal(count, seed=0):
    """int64 [count]: median 1,000, sigma 1.3; one in a thousand is a book of 100,000 or more."""
    rng = np.random.default_rng(seed)
    lengths = rng.lognormal(np.log(1000), 1.3, count)
    books = rng.random(count) < 1e-3
    lengths = np.where(books, rng.lognormal(np.log(120_000), 0.6, count), lengths)
    return np.maximum(lengths, 1).astype(np.int64)


def waste(tokenizer, count=2_000_000):
    """Padding by mode and length, of an epoch or of its first five windows."""
    from lct.data.batches import packing_plan
    from lct.data.batches.store_source import StoreSource

    lengths, rows = lognormal(count), []
    for seq_len in (2**13, 2**15, 2**17, 2**19, 2**20, 2**22):
        for mode in ('packed', 'alone', 'concatenated'):
            source = StoreSource(SyntheticStore(lengths, tokenizer), tokenizer,
                                 mode=getattr(packing_plan, mode))
            places = tokens = cut = windows = 0
            start = time.perf_counter()
            while windows < 5 and source.state['cursors'].get('text', [0])[0] == 0:
                row = source.next_sequence(seq_len)
                tokens += row.counts()[0]
                places += seq_len
                cut += int((row.start > 0).sum())
                windows += not source.state['windows']
            rows.append({'mode': mode, 'seq_len': seq_len, 'sequences': places // seq_len, 'tokens': tokens,
                         'waste': 1 - tokens / places, 'pieces_that_go_on_from_a_sequence_before': cut,
                         'planning_seconds_per_window': (time.perf_counter() - start) / windows})
            print(rows[-1], flush=True)
    return rows


def reading(tokenizer, seq_len=2**20, hosts=64):
    """The most that any of 64 hosts reads of the store for one sequence, relative to 1/64 of the sequence."""
    from lct.data.batches.sharded_loader import read, read_plan
    from lct.data.batches.store_source import StoreSource
    from lct.data.layout import permutation

    source, rows = StoreSource(SyntheticStore(lognormal(500_000), tokenizer), tokenizer), []
    sequence = source.next_sequence(seq_len)
    for devices in (1, 8):  # per host
        ring = hosts * devices
        for layout in LAYOUTS:
            indices, shares, seconds = permutation(layout, seq_len, ring), [], []
            for host in range(hosts):
                held = {(d * seq_len // ring, (d + 1) * seq_len // ring)
                        for d in range(host * devices, (host + 1) * devices)}
                plan, source.documents.bytes_read = read_plan(indices, held), 0
                start = time.perf_counter()
                read(sequence, source.documents, plan.runs)
                seconds.append(time.perf_counter() - start)
                shares.append(source.documents.bytes_read / (4 * seq_len / hosts))
            rows.append({'layout': layout, 'seq_len': seq_len, 'hosts': hosts, 'devices_per_host': devices,
                         'documents': len(sequence.document), 'largest_share': max(shares),
                         'seconds_of_a_host': float(np.median(seconds))})
            print(rows[-1], flush=True)
    return rows


def sparse_store(path, lengths, tokenizer):
    """Write a store of documents of these lengths with sparse shards; it opens and plans like a full one."""
    from lct.data.corpus import index as store
    from lct.data.corpus.shards import sha256_of

    path.mkdir()
    ends, shard = np.concatenate([[0], np.cumsum(lengths)]), 2**30
    tables = {'offsets': ends, 'lengths': lengths,
              'source_of': (np.arange(len(lengths)) % 2).astype(np.int32),
              'names': np.zeros(0, np.uint8), 'name_offsets': np.zeros(len(lengths) + 1, np.int64)}
    shards, crc32s = [], []
    for start in range(0, int(ends[-1]), shard):
        name, count = f'shard-{len(shards):05d}.npy', min(shard, int(ends[-1]) - start)
        np.lib.format.open_memmap(path / name, 'w+', np.uint16, (count,))
        shards.append({'count': count, 'bytes': (path / name).stat().st_size, 'sha256': ''})
        crc32s += sparse_crc32s(path / name, store.CHUNK)
    tables['crc32s'] = np.array(crc32s, np.uint32)
    for name, values in tables.items():
        np.save(path / f'{name}.npy', values)
    index = {'format': store.FORMAT, 'version': store.VERSION, 'tokenizer_hash': tokenizer.fingerprint,
             'vocab_size': tokenizer.vocab_size, 'num_tokens': int(ends[-1]), 'num_documents': len(lengths),
             'sources': ['a', 'b'], 'counts': dict.fromkeys(store.COUNTS, 0), 'shards': shards,
             'chunk_bytes': store.CHUNK,
             'tables': {name: {'count': len(values), 'bytes': (path / f'{name}.npy').stat().st_size,
                               'sha256': sha256_of(path / f'{name}.npy')} for name, values in tables.items()}}
    (path / 'index.json').write_text(json.dumps({**index, 'sha256': store.fingerprint_of(index)}))


def sparse_crc32s(path, chunk_bytes):
    """The crc32 of each chunk of a .npy of zeros, of which only the first one is read."""
    size = path.stat().st_size
    with open(path, 'rb') as file:
        first = zlib.crc32(file.read(chunk_bytes))
    full, last = divmod(size, chunk_bytes)
    zeros = [zlib.crc32(bytes(chunk_bytes))] * full + [zlib.crc32(bytes(last))] * bool(last)
    return [first, *zeros[1:]]


def first_batch(tokenizer, folder):
    """Seconds from opening a store to its first batch, in a new process: median and range of five."""
    rows = []
    for count in (10**4, 10**5, 10**6, 10**7):
        path, lengths = pathlib.Path(folder) / f'store-{count}', lognormal(count)
        sparse_store(path, lengths, tokenizer)
        for seq_len in (2**13, 2**17):
            for weights in ({'text': 1}, {'a': 3, 'b': 1}):
                seconds = [float(subprocess.run(
                    [sys.executable, '-c', FIRST_BATCH, str(path), str(seq_len), json.dumps(weights)],
                    capture_output=True, text=True, check=True,
                    timeout=3600).stdout) for _ in range(5)]
                rows.append({'documents': count, 'tokens': int(lengths.sum()), 'seq_len': seq_len,
                             'weights': weights, 'seconds': float(np.median(seconds)),
                             'from': min(seconds), 'to': max(seconds)})
                print(rows[-1], flush=True)
    return rows


def waiting(_tokenizer, folder, steps=10):
    """Seconds that steps of the laptop job wait for input, with the standard library in a token store."""
    import jax

    from lct.cli.config import load_config, make_run, setup_devices
    from lct.cli.corpus import open_corpus
    from lct.cli.model import find_model

    config = load_config(HERE / 'configs' / 'laptop.py')
    setup_devices(config)
    from lct.data import tokenizer as tokenizers
    from lct.data.corpus.tokenize import tokenize_corpus
    from lct.train import loop
    from lct.weights import llama_hf

    base, folder = find_model(config.model_folder), pathlib.Path(folder)
    library = pathlib.Path(json.__file__).parents[1]
    tokenize_corpus([f'library={library}/*.py'], str(base), folder / 'store', workers=1)
    config.corpus, config.held_out = str(folder / 'store'), 0.1
    for stage in config.stages:
        stage.num_steps = steps
    run = make_run(config)
    source, _ = open_corpus(config, tokenizers.load(base))
    loaders, make = [], source.loader
    source.loader = lambda *arguments: loaders.append(make(*arguments)) or loaders[-1]
    loop.train(run, llama_hf.read_config(base), lambda: llama_hf.load(base)[1], source, folder / 'run')
    lines = map(json.loads, (folder / 'run' / 'metrics' / 'metrics.jsonl').read_text().splitlines())
    speed = {line['seq_len']: line['tokens_per_second'] for line in lines if 'tokens_per_second' in line}
    rows = []
    for stage, loader in zip(run.stages, loaders, strict=True):
        seconds = steps * stage.tokens_per_step / speed[stage.seq_len]
        rows.append({'stage': stage.name, 'steps': steps, 'seconds_of_steps': seconds,
                     'waited': loader.waited_s, 'share': loader.waited_s / seconds,
                     'devices': jax.device_count()})
        print(rows[-1], flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--output', default=str(HERE / 'results' / 'data.json'))
    parser.add_argument('--parts', default='waste,reading,first_batch,waiting',
                        help='measurements, comma-separated')
    args = parser.parse_args()
    from lct.data import tokenizer as tokenizers

    tokenizer, out = tokenizers.load('bytes'), pathlib.Path(args.output)
    results = json.loads(out.read_text()) if out.exists() else {}
    for name in args.parts.split(','):
        with tempfile.TemporaryDirectory() as folder:
            measure = {'waste': waste, 'reading': reading,
                       'first_batch': functools.partial(first_batch, folder=folder),
                       'waiting': functools.partial(waiting, folder=folder)}
            if name not in measure:
                raise SystemExit(f'--parts {name} is not one of {", ".join(measure)}')
            results[name] = measure[name](tokenizer)
        results['machine'] = f'{platform.machine()}, {os.cpu_count()} cores, numpy {np.__version__}'
        out.write_text(json.dumps(results, indent=1) + '\n')


if __name__ == '__main__':
    main()
