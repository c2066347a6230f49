"""Who does how much: attention tiles that each device of a ring computes, by layout, counted, not timed.

    python experiments/bench/balance.py --length 65536 --json experiments/results/balance.json

A tile is one pair of chunks that is not skipped. With one causal document the contiguous layout gives the last
device almost twice the mean (Striped Attention, Brandon et al. 2023, arXiv 2311.09431, figure 2); zigzag and
striped give every device the same. Packed documents cost what they can see.
"""

import argparse
import json
import pathlib

import numpy as np

from lct.cli.main import check_positive, run_script
from lct.data.layout import LAYOUTS, permutation
from lct.ops.blockwise_attention import fit
from lct.ops.masks import EMPTY, chunk_classes


def tiles(layout, ring_size, positions, segments, chunk):
    """Tiles of every device, [ring_size], of one row: positions and segments int [S]."""
    order = permutation(layout, len(positions), ring_size)
    rows = lambda x: x[order].reshape(ring_size, 1, -1).astype(np.int32)
    positions, segments = rows(positions), rows(segments)
    size = fit(chunk, positions.shape[-1])
    count = lambda i, j: np.asarray(
        chunk_classes(positions[i], positions[j], segments[i], segments[j], size, size) > EMPTY).sum()
    return np.array([sum(count(i, j) for j in range(ring_size)) for i in range(ring_size)])


def one_document(length):
    return np.arange(length), np.ones(length, int)


def documents(length, median, seed):
    """Positions and segments of documents with log-normal lengths (sigma 1), as texts have."""
    rng = np.random.default_rng(seed)
    lengths, left = [], length
    while left:
        lengths.append(min(max(1, int(rng.lognormal(np.log(median)))), left))
        left -= lengths[-1]
    return np.concatenate([np.arange(n) for n in lengths]), np.repeat(np.arange(1, len(lengths) + 1), lengths)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--length', type=int, default=65536, help='tokens of the sequence')
    parser.add_argument('--chunk', type=int, default=256)
    parser.add_argument('--rings', type=int, nargs='+', default=[2, 4, 8, 16, 32, 64])
    parser.add_argument('--json', type=pathlib.Path)
    args = parser.parse_args()
    check_positive(args, 'length', 'chunk', 'rings')
    rows = []
    print(f'one causal document of {args.length} tokens, chunks of {args.chunk}: most loaded device / mean')
    print(f'{"ring":>6}' + ''.join(f'{layout:>12}' for layout in LAYOUTS))
    for ring in args.rings:
        loads = {layout: tiles(layout, ring, *one_document(args.length), args.chunk) for layout in LAYOUTS}
        ratios = {layout: float(load.max() / load.mean()) for layout, load in loads.items()}
        print(f'{ring:>6}' + ''.join(f'{ratios[layout]:>12.3f}' for layout in LAYOUTS), flush=True)
        rows.append({'length': args.length, 'chunk': args.chunk, 'ring_size': ring, 'max_over_mean': ratios,
                     'tiles': {layout: int(load.sum()) for layout, load in loads.items()}})
    whole = tiles('zigzag', 8, *one_document(args.length), args.chunk).sum()
    print(f'\npacked documents of median length {args.length // 16}, zigzag over 8: tiles / those of one document')
    for seed in range(5):
        cost = tiles('zigzag', 8, *documents(args.length, args.length / 16, seed), args.chunk).sum() / whole
        print(f'  seed {seed}: {cost:.3f}')
        rows.append({'length': args.length, 'chunk': args.chunk, 'packed_seed': seed, 'packed_cost': float(cost)})
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + '\n')


if __name__ == '__main__':
    run_script(main)
