"""Balance of a ring by layout: attention tiles that each device computes, counted, not timed.

    python experiments/bench/bench_balance.py --length 65536 --output experiments/results/balance.json

A tile is one pair of chunks that is not skipped. With one causal document the contiguous layout gives the
last device almost twice the mean (Striped Attention, Brandon et al. 2023, arXiv 2311.09431, figure 2). Zigzag
and striped give every device the same. Packed documents cost only the tiles inside the documents.
"""

import argparse
import json
import pathlib

from lct.cli.main import check_positive, run_script
from lct.data.layout import LAYOUTS
from lct.plan.balance import one_document, packed_documents, tiles
from lct.text import aligned

SEEDS = range(5)
WIDTHS = (6, *(12 for _ in LAYOUTS))


def one_causal_document(length, chunk, rings):
    """Rows of the JSON: the busiest device over the mean, by layout and ring size."""
    rows = []
    print(f'one causal document of {length} tokens, chunks of {chunk}: most loaded device / mean')
    print(aligned(('ring', *LAYOUTS), WIDTHS, left=()))
    for ring in rings:
        loads = {layout: tiles(layout, ring, *one_document(length), chunk) for layout in LAYOUTS}
        ratios = {layout: float(load.max() / load.mean()) for layout, load in loads.items()}
        print(aligned((ring, *(f'{ratio:.3f}' for ratio in ratios.values())), WIDTHS, left=()), flush=True)
        rows.append({'length': length, 'chunk': chunk, 'ring_size': ring, 'max_over_mean': ratios,
                     'tiles': {layout: int(load.sum()) for layout, load in loads.items()}})
    return rows


def many_documents(length, chunk):
    """Rows of the JSON: tiles of packed documents over the tiles of one document."""
    rows = []
    single = tiles('zigzag', 8, *one_document(length), chunk).sum()
    print(f'\npacked documents of median length {length // 16}, zigzag over 8: tiles / tiles of one document')
    for seed in SEEDS:
        cost = tiles('zigzag', 8, *packed_documents(length, length / 16, seed), chunk).sum() / single
        print(f'  seed {seed}: {cost:.3f}')
        rows.append({'length': length, 'chunk': chunk, 'packed_seed': seed, 'packed_cost': float(cost)})
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--length', type=int, default=65536, help='tokens of the sequence')
    parser.add_argument('--chunk', type=int, default=256)
    parser.add_argument('--rings', type=int, nargs='+', default=[2, 4, 8, 16, 32, 64])
    parser.add_argument('--output', type=pathlib.Path)
    args = parser.parse_args()
    check_positive(args, 'length', 'chunk', 'rings')
    rows = one_causal_document(args.length, args.chunk, args.rings) + many_documents(args.length, args.chunk)
    if args.output:
        args.output.write_text(json.dumps(rows, indent=1) + '\n')


if __name__ == '__main__':
    run_script(main)
