"""What evaluations take beside those of an earlier checkout, in turns on the same machine.

    git worktree add ../before f9ca58e
    python experiments/bench/bench_evaluate.py --before ../before --model DIR --lengths 8192 --rounds 2 \\
        --output experiments/results/evaluate_speed.json
    python experiments/bench/bench_evaluate.py --before ../before --model smollm2 --lengths 8192 --rounds 1

Each round runs the needle grid and RULER with both checkouts, each with its own defaults, in processes of
their own. Seconds of the clock and of the cores are from the start of a process to its end, with compilation
unless JAX_COMPILATION_CACHE_DIR is warm. RULER's prompts are the same on both sides, and how many of their
answers are equal is counted. The needles have the same lengths and depths, but other haystacks: all depths of
a column share one now. The output keeps other suites of an earlier run with the same settings. DIR may be a
copy of experiments/base with larger max_position_embeddings.
"""

import argparse
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time

from lct.cli.main import run_script
from lct.text import table

HERE = pathlib.Path(__file__).resolve().parents[2]
SUITES = 'needle', 'ruler'


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--before', type=pathlib.Path, required=True, help='a checkout to compare with')
    parser.add_argument('--model', default='smollm2')
    parser.add_argument('--lengths', default='8192')
    parser.add_argument('--samples', default='1')
    parser.add_argument('--suites', default=','.join(SUITES))
    parser.add_argument('--rounds', type=int, default=2)
    parser.add_argument('--output', type=pathlib.Path)
    args = parser.parse_args()
    sides, rows = {'before': args.before.resolve(), 'now': HERE}, []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(args.rounds):
            for suite in args.suites.split(','):
                for side in sorted(sides, reverse=i % 2):
                    workdir = pathlib.Path(folder) / f'{side}{i}'
                    rows.append({'suite': suite, 'side': side, **measure(sides[side], workdir, suite, args)})
                    print(json.dumps(rows[-1]), flush=True)
        equal = equal_answers(*(pathlib.Path(folder) / f'{side}0' / 'ruler.jsonl' for side in sides))
    ratios = summary(rows)
    print(f'RULER: {equal[0]} of {equal[1]} answers are equal')
    if args.output:
        content = {'model': args.model, 'lengths': args.lengths, 'samples': args.samples,
                   'cores': os.cpu_count(), 'ratios': ratios, 'equal': equal, 'rows': rows}
        args.output.write_text(json.dumps(joined(args.output, content), indent=1) + '\n')


def joined(path, content):
    """The content with what the file holds of other suites, if they were measured with the same settings."""
    old = json.loads(path.read_text()) if path.exists() else {}
    if any(old.get(name) != content[name] for name in ('model', 'lengths', 'samples', 'cores')):
        return content
    kept = [row for row in old['rows'] if row['suite'] not in content['ratios']]
    equal = content['equal'] if 'ruler' in content['ratios'] else old['equal']
    ratios = old['ratios'] | content['ratios']
    return content | {'ratios': ratios, 'equal': equal, 'rows': kept + content['rows']}


def measure(checkout, workdir, suite, args):
    """Run a suite -> its samples, seconds and CPU seconds."""
    command = [sys.executable, checkout / 'experiments' / 'evaluate.py', '--model', args.model,
               '--suite', suite, '--lengths', args.lengths, '--samples', args.samples, '--workdir', workdir]
    environment = {**os.environ, 'PYTHONPATH': str(checkout)}
    used = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    start, before = time.monotonic(), used()
    subprocess.run(list(map(str, command)), env=environment, cwd=checkout, check=True,
                   stdout=subprocess.DEVNULL)
    samples = len((workdir / f'{suite}.jsonl').read_text().splitlines())
    return {'samples': samples, 's': round(time.monotonic() - start, 1), 'cpu_s': round(used() - before, 1)}


def equal_answers(*paths):
    """(equal texts, samples with the same prompt) of two files of answers; zeros without them."""
    if not all(path.exists() for path in paths):
        return 0, 0
    rows = [map(json.loads, path.read_text().splitlines()) for path in paths]
    first, second = ({(row['task'], row['index']): row for row in own} for own in rows)
    same = [key for key in first if key in second and first[key]['prompt'] == second[key]['prompt']]
    return sum(first[key]['text'] == second[key]['text'] for key in same), len(same)


def summary(rows):
    """Print the medians -> {suite: [ratio of time, ratio of CPU time]}, now to before."""
    lines, ratios = [], {}
    for suite in dict.fromkeys(row['suite'] for row in rows):
        medians = {}
        for side in ('before', 'now'):
            own = [row for row in rows if (row['suite'], row['side']) == (suite, side)]
            medians[side] = [statistics.median(row[name] for row in own) for name in ('s', 'cpu_s')]
            hour = 3600 * own[0]['samples'] / medians[side][0]
            lines.append((suite, side, own[0]['samples'], *(f'{x:.1f}' for x in (*medians[side], hour))))
        ratios[suite] = [round(now / before, 3) for now, before in zip(medians['now'], medians['before'])]
    print(table(('suite', 'side', 'samples', 's', 'CPU s', 'samples an hour'), lines, left=(0, 1)))
    print('now to before, time and CPU time:', json.dumps(ratios))
    return ratios


if __name__ == '__main__':
    run_script(main)
