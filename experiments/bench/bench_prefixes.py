"""What a second call of evaluate.py --session reads of what the first one has read, and what each takes.

    python experiments/bench/bench_prefixes.py --model DIR --length 4096 --output FILE

Two suites: the needle grid, whose columns share an excerpt up to each needle, and own tasks, ten questions
about each of two texts. Each is called without a session, with a new one, and again with that; every call is
a process of its own with its own work directory. CPU seconds include the start of Python, and compilation
unless JAX_COMPILATION_CACHE_DIR is set: then the first of two rounds fills it. DIR may be a copy of
experiments/base with larger max_position_embeddings.
"""

import argparse
import json
import os
import pathlib
import re
import resource
import subprocess
import sys
import tempfile

from lct.cli.main import run_script
from lct.text import table

HERE = pathlib.Path(__file__).resolve().parents[2]
QUESTIONS, CHARACTERS = 10, 2.0  # of a text; of a token, at least
REUSED = re.compile(r'([\d,]+) of ([\d,]+) tokens reused')


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='smollm2')
    parser.add_argument('--length', type=int, default=4096)
    parser.add_argument('--rounds', type=int, default=2)
    parser.add_argument('--output', type=pathlib.Path)
    args = parser.parse_args()
    for i in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            rows = measure(args, pathlib.Path(folder))
        print(f'round {i + 1} of {args.rounds}')
        print(table(list(rows[0]), [list(map(str, row.values())) for row in rows], left=(0, 1)), flush=True)
    if args.output:
        content = {'model': pathlib.Path(args.model).name, 'length': args.length, 'cores': os.cpu_count(),
                   'rows': rows}
        args.output.write_text(json.dumps(content, indent=1) + '\n')


def measure(args, folder):
    """A dict for each suite and call."""
    write_tasks(folder / 'tasks', int(args.length * CHARACTERS))
    rows = []
    for suite, more in (('needle', ['--samples', '2']), ('own', ['--data', folder / 'tasks'])):
        answers, session = {}, ['--session', folder / f'{suite}_texts']
        for call, flags in (('without', []), ('first', session), ('second', session)):
            workdir = folder / f'{suite}_{call}'
            row = evaluate(['--model', args.model, '--suite', suite, '--lengths', args.length, '--mesh',
                            '1,1,1,1', '--workdir', workdir, *more, *flags])
            lines = (workdir / f'{suite}.jsonl').read_text().splitlines()
            answers[call] = [json.loads(line)['text'] for line in lines]
            equal = sum(a == b for a, b in zip(answers[call], answers['without'], strict=True))
            rows.append({'suite': suite, 'call': call, **row, 'samples': len(lines), 'equal answers': equal})
    return rows


def write_tasks(folder, size):
    """Ten questions about each of two texts of so many characters, from the documents of this repository."""
    text = ''.join(path.read_text() for path in sorted(HERE.glob('**/*.md')))
    (folder / 'questions').mkdir(parents=True)
    lines = [{'input': f'{text[i * size:][:size]}\nWhat does line {7 * k} say?\n', 'answer_prefix': 'Answer:',
              'outputs': ['unknown'], 'max_new_tokens': 32} for i in range(2) for k in range(QUESTIONS)]
    (folder / 'questions' / 'a.jsonl').write_text('\n'.join(map(json.dumps, lines)))


def evaluate(flags):
    """Run evaluate.py -> tokens reused and of all prompts, and CPU seconds."""
    before = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    command = [sys.executable, HERE / 'experiments' / 'evaluate.py', *map(str, flags)]
    done = subprocess.run(command, cwd=HERE, env={**os.environ, 'PYTHONPATH': str(HERE)}, capture_output=True,
                          text=True, check=True)
    found = REUSED.search(done.stderr)
    reused, total = (int(x.replace(',', '')) for x in found.groups()) if found else (None, None)
    used = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - before
    return {'tokens reused': reused, 'of tokens': total, 'CPU s': round(used, 1)}


if __name__ == '__main__':
    run_script(main)
