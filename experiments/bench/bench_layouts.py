"""Cost of an attention tile under each layout and with packed documents, side by side in one process.

    python experiments/bench/bench_layouts.py --length 16384 --output experiments/results/layouts.json

Ring attention on virtual devices, forward and forward+backward, CPU seconds over the tiles that are not
skipped (counted as bench_balance.py counts them), as ratios within a round against one causal document in
zigzag. Masks are built only in tiles that need one: a layout with many such tiles pays for them here.
"""

import argparse
import json
import os
import pathlib
import platform
import resource
import statistics

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('--length', type=int, default=16384, help='tokens of the sequence')
parser.add_argument('--devices', type=int, default=8)
parser.add_argument('--chunk', type=int, default=256)
parser.add_argument('--heads', type=int, default=8)
parser.add_argument('--rounds', type=int, default=5)
parser.add_argument('--output', type=pathlib.Path)
ARGS = parser.parse_args()
os.environ['XLA_FLAGS'] = (
    os.environ.get('XLA_FLAGS', '') + f' --xla_force_host_platform_device_count={ARGS.devices}')

import jax  # noqa: E402  the number of devices comes first
import numpy as np  # noqa: E402

from lct.cli.main import check_positive, run_script  # noqa: E402
from lct.data.layout import permutation  # noqa: E402
from lct.ops.blockwise_attention import Chunks  # noqa: E402
from lct.ops.context_parallel import AttentionOptions  # noqa: E402
from lct.ops.ring_attention import ring_attention  # noqa: E402
from lct.plan.balance import one_document, packed_documents, tiles  # noqa: E402
from lct.sharding import make_mesh, spec  # noqa: E402
from lct.text import table  # noqa: E402

HEAD_DIM = 64


def cases():
    """{name: (layout, positions, segments)}; the others are measured against the first."""
    one, packed = one_document(ARGS.length), packed_documents(ARGS.length, ARGS.length / 16, 0)
    return {'zigzag': ('zigzag', *one), 'contiguous': ('contiguous', *one), 'striped': ('striped', *one),
            'zigzag, packed': ('zigzag', *packed), 'contiguous, packed': ('contiguous', *packed),
            'striped, packed': ('striped', *packed)}


def arguments(layout, positions, segments):
    """q, k, v, cotangent, positions and segments on the current mesh, in the layout's order."""
    order = permutation(layout, ARGS.length, ARGS.devices)
    draw = np.random.default_rng(0).standard_normal((4, 1, ARGS.length, ARGS.heads, HEAD_DIM), np.float32)
    rows = [x[None, order].astype(np.int32) for x in (positions, segments)]
    return [jax.device_put(x[:, order], spec('BTNH')) for x in draw] + [jax.device_put(x, spec('BT'))
                                                                        for x in rows]


def programs(*args):
    """{direction: compiled program}: one serves all cases, which differ in their positions alone."""
    heads, index = spec('BTNH'), spec('BT')
    attention = jax.shard_map(
        lambda *x: ring_attention(*x, 'sequence', AttentionOptions(Chunks(ARGS.chunk, ARGS.chunk))),
        in_specs=(heads,) * 3 + (index,) * 2, out_specs=heads)

    def both(q, k, v, cotangent, *tokens):
        return jax.vjp(lambda *x: attention(*x, *tokens), q, k, v)[1](cotangent)

    forward = lambda q, k, v, cotangent, *tokens: attention(q, k, v, *tokens)
    return {name: jax.jit(f).lower(*args).compile() for name, f in (('forward', forward), ('both', both))}


def cpu_seconds(program, args):
    used = lambda: sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    begin = used()
    jax.block_until_ready(program(*args))
    return used() - begin


def show(direction, count, spent):
    """Print the table of a direction and return its JSON rows. spent: CPU seconds per tile, by case."""
    rows = []
    for name, values in spent.items():
        ratios = [a / b for a, b in zip(values, spent['zigzag'], strict=True)]
        rows.append({'direction': direction, 'case': name, 'tiles': count[name],
                     'ms_a_tile': statistics.median(values) * 1e3, 'ratio': statistics.median(ratios),
                     'ratios': ratios})
    print(f'\n{direction}, S {ARGS.length}, {ARGS.heads} heads of {HEAD_DIM}, {ARGS.devices} devices')
    print(table(('case', 'tiles', 'ms per tile, all heads', 'to zigzag', 'range'), [
        (row['case'], row['tiles'], f'{row["ms_a_tile"]:.3f}', f'{row["ratio"]:.3f}',
         f'{min(row["ratios"]):.3f}-{max(row["ratios"]):.3f}') for row in rows]), flush=True)
    return rows


def main():
    check_positive(ARGS, 'length', 'devices', 'chunk', 'heads', 'rounds')
    rows = []
    with jax.set_mesh(make_mesh((1, 1, ARGS.devices, 1))):
        made = {name: arguments(*case) for name, case in cases().items()}
        count = {name: int(tiles(layout, ARGS.devices, positions, segments, ARGS.chunk).sum())
                 for name, (layout, positions, segments) in cases().items()}
        for direction, program in programs(*next(iter(made.values()))).items():
            for args in made.values():
                cpu_seconds(program, args)
            spent = {name: [] for name in made}
            for _ in range(ARGS.rounds):
                for name, args in made.items():
                    spent[name].append(cpu_seconds(program, args) / count[name])
            rows += show(direction, count, spent)
    if ARGS.output:
        settings = {name: value for name, value in vars(ARGS).items() if name != 'json'}
        about = {'settings': settings, 'machine': platform.machine(), 'jax': jax.__version__}
        ARGS.output.write_text(json.dumps({**about, 'table': rows}, indent=1) + '\n')


if __name__ == '__main__':
    run_script(main)
