"""Time and memory of attention against length and ring size, drawn from what bench_attention.py wrote.

    python experiments/studies/plot_attention.py

It reads experiments/results/*_attention.jsonl and writes attention_{time,memory,ring}.svg beside them.
"""

import argparse
import json
import pathlib

from lct.cli.main import run_script
from lct.eval.report import svg

RESULTS = pathlib.Path(__file__).resolve().parents[1] / 'results'
NAMES = {'lct': 'ours', 'bair': 'BAIR'}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--results', type=pathlib.Path, default=RESULTS,
                        help='folder that is read and written')
    folder = parser.parse_args().results
    speeds, sizes = (read(folder / name) for name in ('speed_attention.jsonl', 'memory_attention.jsonl'))
    of_eight = lambda row: row['devices'] == 8
    for name, picture in {
        'time': svg.lines(series(speeds, 'length', 'cpu_s', of_eight), 'tokens', 'CPU seconds',
                              'forward + backward, float32, 8 heads of 64, 8 devices on 2 cores', log_y=True),
        'memory': svg.lines(series(sizes, 'length', 'temp_mib', of_eight), 'tokens', 'MiB a device',
                                'temporaries of forward + backward, ring of 8, compiled', log_y=True),
        'ring': svg.lines(series(sizes, 'devices', 'temp_mib',
                                 lambda row: row['length'] // row['devices'] == 2048),
                              'ring size, 2,048 tokens a device', 'MiB a device',
                              'temporaries of forward + backward, compiled', lengths=False),
    }.items():
        picture.save(folder / f'attention_{name}.svg')
        print(f'written: {folder}/attention_{name}.svg')


def read(path):
    """Rows of float32, forward and backward, one document in zigzag, heads of 64."""
    rows = map(json.loads, path.read_text().splitlines())
    wanted = {'dtype': 'float32', 'direction': 'both', 'documents': 1, 'head_dim': 64, 'layout': 'zigzag'}
    return [row for row in rows if all(row.get(name, value) == value for name, value in wanted.items())]


def series(rows, x, y, chosen):
    """{name: ([x], [y])} of the chosen rows; the smallest y where a contestant has several chunk sizes."""
    least = {}
    for row in filter(chosen, rows):
        name = f'{NAMES[row["contestant"].split(":")[0]]}, {row["heads"]}/{row["kv_heads"]} heads'
        points = least.setdefault(name, {})
        points[row[x]] = min(points.get(row[x], row[y]), row[y])
    return {name: tuple(zip(*sorted(points.items()))) for name, points in least.items()}


if __name__ == '__main__':
    run_script(main)
