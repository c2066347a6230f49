"""Every task of every suite with readers that stand in for a model: an oracle, a mute and a half reader.

    python experiments/checks/check_tasks.py --output experiments/results/tasks.json
    python experiments/checks/check_tasks.py --suite comprehension --lengths 1024,8192

The oracle has to score 100, the mute reader 0, and the half reader, which answers one prompt in two like the
oracle, 50 within its interval, for two seeds that agree (one seed from 1M on). The oracle reads the prompt
alone, except in the suite icl, whose hidden rules no reader finds in every prompt: there it knows the
references. Every prompt is counted as a whole, and the fill is the share of its length that it takes with its
answer, on average and at least. Haystacks are the standard library of this interpreter, and repositories are
made of it and of small files, without which 1K has no room for one. With the --tokenizer of a model that has
a chat template, prompts are counted in it.
"""

import argparse
import collections
import concurrent.futures
import json
import math
import multiprocessing
import os
import pathlib
import time

from lct.cli.main import check_positive, run_script
from lct.cli.model import parse_ints
from lct.data import chat_template
from lct.data import tokenizer as tokenizers
from lct.data.corpus import documents
from lct.eval import answers, runner, scoring
from lct.eval.suites import SUITES
from lct.eval.suites.plan import make_material
from lct.eval.suites.suite import Plan, PromptSuite
from lct.eval.tasks import comprehension_readers, reference_readers
from lct.eval.tasks.material import Material
from lct.files import write_atomically
from lct.text import short_length, table
from lct.weights import llama_hf

ROOT = pathlib.Path(__file__).resolve().parents[2]
READERS = {  # suite: its oracle, from a prompt to an answer; None for one that knows the references
    'ruler': reference_readers.oracle, 'needle': reference_readers.oracle,
    'adversarial': reference_readers.rule_reader, 'repository': reference_readers.code_reader,
    'comprehension': comprehension_readers.oracle, 'icl': None}
SAMPLES = {1024: 24, 8192: 8, 65536: 2, 2**20: 1}  # of each task and seed
SEEDS = 42, 43
ONE_SEED = 2**20  # tokens, from which on the first seed is enough
MAX_BYTES = 10**7  # of haystack
DEPTHS = 0.0, 0.3, 0.6, 1.0  # of the needle grid
SURE = 4.0  # standard errors: some of hundreds of 95% intervals always miss
HEADER = ['suite', 'task', 'length', 'n', 'oracle', 'mute', 'half', 'over', 'fill', 'lowest', 'CPU s']


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--suite', default=','.join(READERS))
    parser.add_argument('--lengths', default=','.join(map(str, SAMPLES)))
    parser.add_argument('--samples', type=int,
                        help='of each task, length and seed; default: fewer for longer')
    parser.add_argument('--processes', type=int, default=os.cpu_count())
    parser.add_argument('--tokenizer', default=str(ROOT / 'experiments' / 'base'),
                        help='a Hugging Face folder')
    parser.add_argument('--output', type=pathlib.Path)
    args = parser.parse_args()
    if args.samples is not None:
        check_positive(args, 'samples')
    lengths = parse_ints('--lengths', args.lengths)
    counts = {length: args.samples or SAMPLES[max(own for own in SAMPLES if own <= max(length, min(SAMPLES)))]
              for length in lengths}
    jobs = [(seed, name, args.tokenizer, counts) for name in args.suite.split(',') for seed in SEEDS]
    rows = []
    with concurrent.futures.ProcessPoolExecutor(
            mp_context=multiprocessing.get_context('spawn'), max_workers=args.processes) as pool:
        for future in concurrent.futures.as_completed(pool.submit(check_suite, *job) for job in jobs):
            rows += future.result()
    rows.sort(key=lambda row: (list(READERS).index(row['suite']), row['length']))
    problems, summary = judge(rows)
    shown = [cells(row) for row in merged(rows)]
    if args.output:
        summary = {'tokenizer': pathlib.Path(args.tokenizer).name, 'seeds': SEEDS, **summary}
        named = [dict(zip(HEADER, row, strict=True)) for row in shown]
        write_atomically(args.output, json.dumps({'summary': summary, 'tasks': named}, indent=1) + '\n')
    print(table(HEADER, shown, left=(0, 1)))
    print('\n'.join(f'{name}: {value}' for name, value in summary.items()))
    if problems:
        raise ValueError(f'{len(problems)} tasks fail: ' + '; '.join(problems[:8]))


def check_suite(seed, name, tokenizer, counts):
    """The rows of a suite and a seed. counts: {length: samples of each task}."""
    rows, texts = [], documents.read('embedded', max_bytes=MAX_BYTES)
    texts += small_files() if name == 'repository' else []
    material = make_material(load(tokenizer), texts, 'embedded', seed)
    for length, count in counts.items():
        if length < ONE_SEED or seed == SEEDS[0]:
            for row in check(SUITES[name], material, length, count):
                rows.append({**row, 'seed': seed})
                print(f'{seed} {describe(row)}', flush=True)
    return rows


def load(folder):
    """The model in a folder, without its weights."""
    try:
        template = chat_template.load(folder)
    except chat_template.MissingTemplate:
        template = None
    return runner.Model(None, llama_hf.read_config(pathlib.Path(folder)), tokenizers.load(folder), template)


def small_files():
    """Files of two functions."""
    return [documents.Document(f'small/part_{i}.py', ''.join(
        f'def {name}_{i}(left, right={i}):\n    return left + right\n\n\n' for name in ('add', 'join')))
        for i in range(500)]


def check(suite: PromptSuite, material: Material, length: int, count: int):
    """Iterator of one dict for each task of a suite at a length."""
    plan = Plan(material, (length,), {length: -(-count // len(DEPTHS)) if suite.name == 'needle' else count},
                depths=DEPTHS)
    by_task = collections.defaultdict(list)
    for item in suite.items(plan):
        by_task[item.task].append(item)
    for task, items in by_task.items():
        longest = max(item.length for item in items)  # learning in context has all numbers of shots
        out = collections.defaultdict(list)
        for item in items:
            if item.length == longest:
                for name, value in measure(suite, material, item).items():
                    out[name].append(value)
        yield {'suite': suite.name, 'task': task, 'length': length, 'n': len(out['fill']),
               'oracle': out['oracle'], 'mute': out['mute'], 'half': out['half'],
               'over': sum(fill > 1 for fill in out['fill']), 'fill': out['fill'],
               'seconds': round(sum(out['seconds']) / len(out['seconds']), 3)}


def measure(suite, material, item):
    """Scores of the readers, the fill, and the CPU seconds that the sample takes to make."""
    start = time.process_time()
    sample = item.make()
    seconds = time.process_time() - start
    reader = READERS[suite.name]
    right = sample.outputs[0] if reader is None else reader(sample.text)
    half = right if reference_readers.coin_flip(sample.text) else ''
    score = lambda text: suite.row_score(answers.make_row(sample, [], text, 0))
    return {'oracle': score(right), 'mute': score(''), 'half': score(half), 'seconds': seconds,
            'fill': round(material.tokens_used(sample) / sample.length, 4)}


# ---------------------------------------------------------------------------------------------------
# Judgement
# ---------------------------------------------------------------------------------------------------


def judge(rows):
    """([a sentence for each failure], {what was found: numbers})."""
    problems, held, differ, pairs = [], 0, 0, 0
    for row in rows:
        place = f"{row['suite']} {row['task']} at {row['length']}"
        if min(row['oracle']) < 1 or max(row['mute']) > 0:
            problems.append(f"{place}: oracle {mean(row['oracle'])}, mute {mean(row['mute'])}")
        if row['over']:
            problems.append(f"{place}: {row['over']} prompts over the length")
    for key, by_seed in by_task(rows).items():
        scores = [[x for row in of_seed for x in row['half']] for of_seed in by_seed.values()]
        intervals = [scoring.wilson(sum(one) / len(one), len(one)) for one in scores]
        held += sum(low <= 0.5 <= high for low, high in intervals)
        pairs += 1
        differ += max(low for low, _ in intervals) > min(high for _, high in intervals)
        every = [x for one in scores for x in one]
        if abs(mean(every) / 100 - 0.5) > SURE * 0.5 / math.sqrt(len(every)):
            problems.append(f"{' '.join(key)}: half reader {mean(every)} of {len(every)} samples")
    fills = [fill for row in rows for fill in row['fill']]
    return problems, {
        'tasks': pairs, 'prompts': len(fills), 'prompts over their length': sum(fill > 1 for fill in fills),
        'lowest fill': min(fills), 'mean fill': round(sum(fills) / len(fills), 4),
        'intervals of the half reader that hold 50': f'{held} of {2 * pairs}',
        'tasks whose two seeds have intervals apart': f'{differ} of {pairs}',
        'slowest sample, CPU s': max(row['seconds'] for row in rows)}


def by_task(rows):
    """{(suite, task): {seed: rows}}."""
    out = {}
    for row in rows:
        out.setdefault((row['suite'], row['task']), {}).setdefault(row['seed'], []).append(row)
    return out


def merged(rows):
    """The rows of both seeds as one."""
    out = {}
    for row in rows:
        own = out.setdefault((row['suite'], row['task'], row['length']), dict(row))
        if own['seed'] != row['seed']:
            own |= {name: own[name] + row[name] for name in ('n', 'over', 'fill', 'oracle', 'mute', 'half')}
            own['seconds'] = max(own['seconds'], row['seconds'])
    return out.values()


def cells(row):
    return [row['suite'], row['task'], short_length(row['length']), row['n'], mean(row['oracle']),
            mean(row['mute']), mean(row['half']), row['over'], mean(row['fill']), mean([min(row['fill'])]),
            row['seconds']]


def describe(row):
    return ' '.join(map(str, cells(row)))


def mean(values):
    """In percent."""
    return round(100 * sum(values) / len(values), 1)


if __name__ == '__main__':
    run_script(main)
