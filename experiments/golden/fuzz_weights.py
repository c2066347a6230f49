"""Feed the readers of weights with mutated headers, indexes, configs, pickles and archives.

    python experiments/golden/fuzz_weights.py [--count 200000] [--seed 0]

A file is either accepted, and then every tensor that it describes can be read, or refused by a ValueError of
one line that names the file. Anything else ends the run and leaves the input: another exception, more than a
second of CPU time, a gigabyte of address space.
"""

import argparse
import collections
import copy
import json
import pathlib
import pickletools
import random
import resource
import shutil
import signal
import sys
import tempfile
import time

import numpy as np
import tiny_hf

from lct import json_files
from lct.cli.main import check_positive, run_script
from lct.weights import llama_hf, llama_meta, safetensors_files, torch_files

GOLDEN = pathlib.Path(__file__).resolve().parents[2] / 'tests' / 'golden'
SECONDS, BYTES = 1.0, 2**30  # limits of CPU time for a case, and of address space for the run
VALUES = [
    None, True, False, 0, -1, 1, 2, 3, 31, 2**31, 2**63, 10**30, 10**3999, 10**4200, 0.5, -0.0, 1e308,
    float(         'nan'), float(         'inf'), '', 'F32', 'BF16', 'F64', 'I8', 'x' * 300, '\ud800', '../a',
    '/etc/passwd', 'a/b.safetensors', 'a\nb.safetensors', 'llama', 'yarn', 'dynamic', 'longrope', 'llama3',
    'linear', [], {}, [0], [1, 2], [[]], {'a': 1}, [1] * 100, [0, 2**62],
    {'rope_type': 'yarn', 'factor': 4.0}, {'rope_type': 'longrope'}, {'type': 'dynamic'},
    ['LlamaForCausalLM'], {'__metadata__': 3},
    {'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0},
]
SNIPPETS = [b'"', b'\\', b'{', b'}', b'[' * 2000, b'9' * 5000, b',', b':', b'null', b'1e999', b'NaN', b'\xff',
            b'\0', b'\\ud800', b'-', b'{"a":' * 1500]


def nodes(value, path=()):
    """Paths of all nodes of a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield from nodes(child, (*path, key))


def mutated_json(draw, value):
    """Text of a JSON value with nodes replaced, removed, added or renamed; sometimes damaged as text too."""
    value = copy.deepcopy(value)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        *parents, last = draw.choice([path for path in nodes(value) if path] or [(None,)])
        if last is None:
            break
        node = value
        for key in parents:
            node = node[key]
        action = draw.randrange(6)
        if action == 0:
            del node[last]
        elif action == 1 and isinstance(node, dict):
            node[str(draw.choice(VALUES))[:400]] = node.pop(last)
        elif action == 2:
            old = node[last]
            node[last] = old + draw.choice((-1, 1, 2**32)) if type(old) is int else [old]
        elif action == 3 and isinstance(node, dict):
            node['extra'] = copy.deepcopy(draw.choice(VALUES))
        else:
            node[last] = copy.deepcopy(draw.choice(VALUES))
    sys.set_int_max_str_digits(0)
    text = json.dumps(value).encode()
    sys.set_int_max_str_digits(4300)
    return mutated_bytes(draw, text, SNIPPETS) if draw.random() < 0.25 else text


def mutated_bytes(draw, data, snippets):
    """Bytes with a few flips, insertions of snippets, cuts and copies."""
    data = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4))):
        at = draw.randrange(len(data) + 1)
        action = draw.randrange(6)
        if action == 0 and at < len(data):
            data[at] = draw.randrange(256)
        elif action == 1 and at < len(data):
            data[at] ^= 1 << draw.randrange(8)
        elif action == 2:
            data[at:at] = draw.choice(snippets)
        elif action == 3:
            del data[at:at + draw.choice((1, 2, 8, 50, len(data)))]
        elif action == 4:
            start = draw.randrange(len(data) + 1)
            data[at:at] = data[start:start + draw.randrange(60)]
        else:
            size = draw.choice((1, 2, 4, 8))
            data[at:at + size] = draw.choice((0, 1, 2**31, 2**63, 2**64 - 1)).to_bytes(8, 'little')[:size]
    return bytes(data)


# ---------------------------------------------------------------------------------------------------
# Targets: each writes a mutated file, yields the path that an error must name, and reads the file
# ---------------------------------------------------------------------------------------------------


class Targets:
    """The kinds of files, each a generator method of a random source."""

    def __init__(self, folder):
        self.folder = folder
        tiny_hf.write_case('sharded', folder / 'hf')
        self.config = tiny_hf.CASES['llama3']['config']
        self.params = {'dim': 32, 'n_layers': 2, 'n_heads': 4, 'n_kv_heads': 2, 'vocab_size': 128,
                       'multiple_of': 16, 'ffn_dim_multiplier': 1.3, 'norm_eps': 1e-5, 'rope_theta': 500000.0,
                       'use_scaled_rope': True}
        self.index = json.loads((folder / 'hf' / 'model.safetensors.index.json').read_text())
        values = {'a': np.ones((2, 3), np.float32), 'b': np.ones(5, np.float32),
                  'c': np.ones((1, 1), np.float32)}
        path = folder / 'valid.safetensors'
        tiny_hf.write_safetensors(path, values)
        data = path.read_bytes()
        size = 8 + int.from_bytes(data[:8], 'little')
        self.header, self.data = json.loads(data[8:size]), data[size:]
        with torch_files.create(folder / 'x.pth', {name: x.shape for name, x in values.items()},
                                'F32') as arrays:
            for name, array in arrays.items():
                array[...] = values[name]
        self.pths = [path.read_bytes() for path in (folder / 'x.pth', *sorted(GOLDEN.glob('torch_*.pth')))]
        self.opcodes = [op.code.encode('latin-1') for op in pickletools.opcodes] + [
            b'cos\nsystem\n', b'(X\x02\0\0\0lsios\nsystem\n', b'r\xff\xff\xff\xff', b'\x8b\xff\xff\xff\x7f',
            b'}q\0', b'\x85' * 3000, b'(' * 3000, b'tR', b'ctorch\nload\n', b')\x81', b'\x93',
            b'B\xff\xff\xff\x7f']

    def safetensors(self, draw):
        path = self.folder / 'm.safetensors'
        text = mutated_json(draw, self.header)
        length = draw.choice((0, 1, 2**31, 2**63, len(text) + 1)) if draw.random() < 0.05 else len(text)
        data = self.data if draw.random() < 0.8 else self.data[:draw.randrange(len(self.data))]
        path.write_bytes(length.to_bytes(8, 'little') + text + data)
        yield path
        for tensor in safetensors_files.read_header(str(path)).values():
            if tensor.dtype in ('F32', 'F16', 'BF16') and len(tensor.shape) <= 2:
                tensor.read().sum()

    def index_of_shards(self, draw):
        path = self.folder / 'hf' / 'model.safetensors.index.json'
        path.write_bytes(mutated_json(draw, self.index))
        yield path.parent
        safetensors_files.read_folder(str(path.parent))

    def config_json(self, draw):
        path = self.folder / 'config.json'
        path.write_bytes(mutated_json(draw, self.config))
        yield path
        config = llama_hf.config_from_json(json_files.read_json(str(path)), str(path))
        llama_hf.checkpoint_shapes(config)

    def params_json(self, draw):
        path = self.folder / 'params.json'
        path.write_bytes(mutated_json(draw, self.params))
        yield path
        llama_meta.config_from_params(json_files.read_json(str(path)), str(path))

    def torch(self, draw):
        path = self.folder / 'y.pth'
        data = draw.choice(self.pths)
        start, end = data.index(b'\x80\x02'), data.index(b'.PK') + 1 if b'.PK' in data else len(data) // 2
        kind = draw.randrange(3)
        if kind == 0:  # only the pickle; its length is kept, so that all else stays in its place
            table = mutated_bytes(draw, data[start:end], self.opcodes)
            data = data[:start] + table[:end - start].ljust(end - start, b'.') + data[end:]
        elif kind == 1:  # the directory at the end
            at = data.index(b'PK\1\2')
            signatures = [b'PK\5\6', b'PK\1\2', b'PK\6\7', b'\xff\xff\xff\xff']
            data = data[:at] + mutated_bytes(draw, data[at:], signatures)
        else:
            data = mutated_bytes(draw, data, self.opcodes)
        path.write_bytes(data)
        yield path
        for tensor in torch_files.read_header(str(path)).values():
            if len(tensor.shape) <= 2:
                tensor.read().sum()


def run_case(target, draw):
    """'accepted' or 'refused'; an AssertionError if the reader did anything else."""
    steps = target(draw)
    path = str(next(steps))
    try:
        next(steps, None)
    except ValueError as error:
        message = str(error)
        good = path in message and '\n' not in message and len(message) < 1200
        assert good, f'bad message: {message[:2000]!r}'
        return 'refused'
    return 'accepted'


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--count', type=int, default=200_000)
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    check_positive(args, 'count')

    def too_long(*_):
        raise AssertionError(f'more than {SECONDS} s of CPU time')

    signal.signal(signal.SIGVTALRM, too_long)
    np.seterr(all='ignore')
    folder = pathlib.Path(tempfile.mkdtemp(dir='/dev/shm' if pathlib.Path('/dev/shm').is_dir() else None))
    targets = Targets(folder)
    kinds = [targets.safetensors, targets.index_of_shards, targets.config_json, targets.params_json,
             targets.torch]
    used = int(pathlib.Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, used + BYTES))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    results, start, slowest = collections.Counter(), time.perf_counter(), 0.0
    for i in range(args.count):
        draw, kind = random.Random(f'{args.seed}.{i}'), kinds[i % len(kinds)]
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        began = time.process_time()
        try:
            results[kind.__name__, run_case(kind, draw)] += 1
        except BaseException:
            print(
                f'case {i} of seed {args.seed} ({kind.__name__}); its files are in {folder}', file=sys.stderr)
            raise
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        slowest = max(slowest, time.process_time() - began)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    shutil.rmtree(folder)
    for (name, outcome), count in sorted(results.items()):
        print(f'{name:16} {outcome:9} {count:,}')
    print(
        f'{args.count:,} cases in {time.perf_counter() - start:.0f} s; the slowest took {slowest:.3f} s of '
        f'CPU time; memory grew by {grown:.0f} MB')


if __name__ == '__main__':
    run_script(main)
