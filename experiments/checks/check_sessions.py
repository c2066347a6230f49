"""Times the first process that reads a text beside later ones that find it on disk, on several meshes.

    python experiments/checks/check_sessions.py --model base --tokens 65536
    python experiments/checks/check_sessions.py --model smollm2 --tokens 8192 --written 1,1,1,1 \\
        --read 1,1,1,1 --output experiments/results/sessions.json

For each mesh of --written a process reads 20 files, answers a question and keeps the text; for each mesh of
--read another one answers the same question from it, with the same tokens. Then one file changes. Times are
from the start of a process to its end, beside CPU seconds, which other work on the machine does not change.
Programs come from the cache that ask.py keeps, unless JAX_COMPILATION_CACHE_DIR names another; with --warm
every first process runs twice.
"""

import argparse
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

from lct import text
from lct.cli.model import find_model
from lct.data import tokenizer as tokenizers
from lct.data.corpus import documents

ASK = pathlib.Path(__file__).resolve().parents[1] / 'ask.py'
NUM_FILES, CHANGED = 20, 13
ROOM = 400  # tokens for headers, question and answer
MESHES = ['1,1,1,1', '1,1,2,1', '1,1,8,1']


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='base')
    parser.add_argument('--tokens', type=int, default=8192)
    parser.add_argument('--written', nargs='+', default=MESHES)
    parser.add_argument('--read', nargs='+', default=MESHES)
    parser.add_argument('--warm', action='store_true')
    parser.add_argument('--output', type=pathlib.Path, help='JSON of which this run replaces its model')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        check(args, pathlib.Path(folder))


def check(args, folder):
    model = with_positions(args, folder)
    write_files(folder / 'files', model, args.tokens)
    rows, answers = [], set()
    for written in args.written:
        for _ in range(1 + args.warm):
            shutil.rmtree(folder / 'session', ignore_errors=True)
            first = ask(folder, model, written)
        rows.append((written, 'reads', *first[1:], ''))
        answers.add(first[0])
        for read in args.read:
            later = ask(folder, model, read)
            answers.add(later[0])
            rows.append((written, read, *later[1:], f'{later[2] / first[2]:.3f}'))
    path = folder / 'files' / f'{CHANGED:02d}.py'
    path.write_text('# changed\n' + path.read_text())
    rows.append(('one of 20 files changed', args.read[0], *ask(folder, model, args.read[0])[1:], ''))
    header = 'mesh that read', 'mesh that asks', 'wall s', 'CPU s', 'tokens reused', 'of', 'CPU ratio'
    print(text.table(header, [(a, b, f'{c:.1f}', f'{d:.1f}', *rest) for a, b, c, d, *rest in rows], (0, 1)))
    before = tokens_before(folder, model)
    print(f'{len(answers)} distinct answer(s); before the changed file are {before:,} tokens')
    if args.output:
        kept = json.loads(args.output.read_text()) if args.output.exists() else {}
        names = 'written', 'asked', 's', 'cpu_s', 'reused', 'tokens', 'cpu_ratio'
        kept[args.model] = {
            'answers': len(answers), 'tokens before the changed file': before,
            'rows': [dict(zip(names, (a, b, round(c, 1), round(d, 1), *rest))) for a, b, c, d, *rest in rows]}
        args.output.write_text(json.dumps(kept, indent=1) + '\n')


def with_positions(args, folder):
    """The model's folder, or a copy with more positions."""
    source = find_model(args.model)
    config = json.loads((source / 'config.json').read_text())
    if config['max_position_embeddings'] >= args.tokens:
        return source
    shutil.copytree(source, folder / 'model')
    (folder / 'model' / 'config.json').write_text(
        json.dumps(config | {'max_position_embeddings': args.tokens}))
    return folder / 'model'


def write_files(folder, model, tokens):
    """Files of Python's standard library of equal sizes, tokens in total."""
    folder.mkdir()
    tokenizer, each = tokenizers.load(model), (tokens - ROOM) // NUM_FILES - 16
    source = ''.join(document.text for document in documents.read('embedded', 8 * tokens))
    ids = tokenizer.encode(source)
    for i in range(NUM_FILES):
        (folder / f'{i:02d}.py').write_text(tokenizer.decode(ids[i * each:(i + 1) * each]) + '\n')


def ask(folder, model, mesh):
    """-> (answer, wall seconds, CPU seconds, tokens reused, tokens of the files) of a process."""
    command = [sys.executable, ASK, '--model', model, '--mesh', mesh, '--files', folder / 'files',
               '--session', folder / 'session', '--question', 'Which module is the second one?',
               '--max-new-tokens', '16']
    start = time.monotonic()
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True)
    out = process.stdout.read()
    err = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f'ask.py ended with status {status}: {err[-500:]}')
    reused, total = re.search(r'([\d,]+) of ([\d,]+) tokens reused', err).groups()
    lines = [line for line in err.splitlines() if line.startswith(('read ', 'session', '  '))]
    print(mesh, *lines, sep='\n  ', flush=True)
    return out, time.monotonic() - start, usage.ru_utime + usage.ru_stime, reused, total


def tokens_before(folder, model):
    """Tokens of the files before the one that changes."""
    tokenizer = tokenizers.load(model)
    names = [f'{i:02d}.py' for i in range(CHANGED)]
    return sum(len(tokenizer.encode(f'======== {name} ========\n{(folder / "files" / name).read_text()}'))
               for name in names)


if __name__ == '__main__':
    main()
