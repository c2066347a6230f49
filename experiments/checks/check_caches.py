"""Loss by position with a cache in 8 bits beside the full cache, of the same tokens.

    python experiments/checks/check_caches.py --model smollm2 --output experiments/results/caches_smollm2.json

Each text is read in prefill chunks, so that a token attends to the tokens of its chunk as they are and to all
before it as the cache has them. The default texts are three that every installation has: Python's language
reference, a module of its standard library, and the sources of this package.
"""

import argparse
import functools
import json
import pathlib
import sysconfig

import jax
import numpy as np

from lct.cli.main import run_script
from lct.cli.model import add_model_flags, load_model, mesh_context
from lct.cli.paths import experiments_folder
from lct.text import table

STDLIB = pathlib.Path(sysconfig.get_path('stdlib'))
TEXTS = (STDLIB / 'pydoc_data' / 'topics.py', STDLIB / 'typing.py', experiments_folder().parent / 'lct')
LIMIT = 0.005  # nats


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser)
    parser.add_argument('--length', type=int, default=8192, help='tokens of each text')
    parser.add_argument('--texts', nargs='+', type=pathlib.Path, default=TEXTS,
                        help='text files, or folders of Python files')
    parser.add_argument('--windows', type=int, default=1, help='windows of each text, one after the other')
    parser.add_argument('--output', type=pathlib.Path)
    if not check(parser.parse_args()):
        raise SystemExit('a bin differs by more than the limit')


def check(args):
    """Print the table, write the JSON and return whether every bin is within LIMIT."""
    from lct.eval.loss import by_position
    from lct.models import kv_cache

    with mesh_context(args.mesh):
        model, _ = load_model(args)
        windows = [window for path in args.texts
                   for window in text_windows(model.tokenizer, path, args.length, args.windows)]
        full, small = (np.stack([losses(model, window, dtype, args.piece or 128) for window in windows])
                       for dtype in ('float32', 'int8'))
    edges = by_position.doubling_edges(args.length)
    bins = [bin_row(full[:, a:b], small[:, a:b], a, b) for a, b in zip(edges, edges[1:])]
    sizes = [kv_cache.bytes_of(model.config, dtype) for dtype in ('bfloat16', 'int8')]
    print(table(('positions', 'full', 'int8', 'int8 - full', 'standard error'),
                [(f'{b["from"]}-{b["to"]}', f'{b["full"]:.4f}', f'{b["int8"]:.4f}', f'{b["difference"]:+.5f}',
                  f'{b["standard_error"]:.5f}') for b in bins], left=(0,)))
    largest = max(abs(b['difference']) for b in bins)
    print(f'largest difference {largest:.5f} nats, limit {LIMIT}; a slot takes {sizes[1]} bytes, '
          f'{sizes[1] / sizes[0]:.4f} of {sizes[0]} in bfloat16')
    if args.output:
        args.output.write_text(json.dumps({
            'model': args.model, 'windows': len(windows), 'piece': args.piece or 128, 'bins': bins,
            'bytes_a_slot': dict(zip(('bfloat16', 'int8'), sizes))}, indent=1) + '\n')
    return largest <= LIMIT


def bin_row(full, small, start, stop):
    difference = (small - full).astype(np.float64)
    return {'from': start, 'to': stop, 'full': float(full.mean()), 'int8': float(small.mean()),
            'difference': float(difference.mean()),
            'standard_error': float(difference.std() / difference.size**0.5)}


def text_windows(tokenizer, path, length, count):
    """Up to count arrays int32 [length + 1] of the beginning of a file, or of a folder's Python files."""
    files = sorted(path.rglob('*.py')) if path.is_dir() else [path]
    ids = tokenizer.encode('\n'.join(file.read_text() for file in files)[:8 * length * count])
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    size = length + 1 - len(bos)
    parts = [ids[i * size:(i + 1) * size] for i in range(min(count, len(ids) // size))]
    return [np.array([*bos, *part], np.int32) for part in parts]


def losses(model, ids, dtype, size):
    """float32 [length]: the loss of every token but the first, read in chunks into a cache of the dtype."""
    from lct import sharding
    from lct.data import layout
    from lct.models import kv_cache, prompt_layout
    from lct.models.memory import Memory
    from lct.ops import rope

    length, memory = len(ids) - 1, Memory(remat='none')
    indices = layout.permutation(model.layout, length, sharding.axis_size('sequence'))
    places = prompt_layout.place(prompt_layout.arrange([[]], length, indices))
    tables = rope.make_tables(model.config.rope, model.config.head_dim, length)
    config = model.config.architecture()
    cache = jax.jit(kv_cache.empty_cache, static_argnums=(0, 2))(config, places.positions, dtype)
    out = []
    for start in range(0, length, size):
        chunk = prompt_layout.place_chunk([ids[start:start + size].tolist()], np.array([start]), size,
                                          np.argsort(indices))
        targets = sharding.put(ids[None, start + 1:start + size + 1], sharding.spec('BT'))
        cache, loss = chunk_losses(model.params, config, cache, chunk, targets, tables, memory)
        out.append(sharding.fetch(loss)[0])
    return np.concatenate(out)


@functools.partial(jax.jit, static_argnames=('config', 'memory'), donate_argnames='cache')
def chunk_losses(params, config, cache, chunk, targets, tables, memory):
    """The cache with the chunk in it, and the losses float32 [B, T] of the tokens that follow each of its."""
    from lct.models import decode, llama
    from lct.ops.cross_entropy import cross_entropy
    from lct.ops.norms import rms_norm

    cache, x = decode.extend_states(params, config, cache, chunk, tables, memory)
    x = rms_norm(x, params.final_norm, config.norm_eps)
    mask = jax.numpy.ones(targets.shape, jax.numpy.float32)
    return cache, cross_entropy(x, llama.head(params), targets, mask, memory.loss_chunk)


if __name__ == '__main__':
    run_script(main)
