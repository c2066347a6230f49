"""Drills of evaluations and exports: killed, edited, emptied and deleted under their feet."""

import json
import pathlib
import random
import shutil
import signal
import time

from drill import CHECKS, drill, expect, files_of, finish, sha256, start

EVALUATE, CONVERT = CHECKS.parent / 'evaluate.py', CHECKS.parent / 'convert_weights.py'
FLAGS = ('--model', 'base', '--suite', 'ruler,needle', '--tasks', 'niah_single_1,needle',
         '--lengths', '512', '--samples', 1, '--batch-tokens', 1024)
LIMIT_S = 900  # of an evaluation; most of it compiles
FILES = ('ruler.jsonl', 'needle.jsonl', 'results.json', 'results.csv', 'report.html')


def begin(workdir):
    # Compiled quickly, once for all evaluations of a drill.
    fast = {'JAX_DISABLE_MOST_OPTIMIZATIONS': '1', 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
            'JAX_COMPILATION_CACHE_DIR': str(workdir.parent / 'jax_programs')}
    return start([EVALUATE, *FLAGS, '--workdir', workdir], fast)


def evaluated(workdir):
    """Run the evaluation to its end, which must be a good one."""
    ended = finish(begin(workdir), LIMIT_S)
    expect(ended.status == 0, f'status {ended.status}: {ended.stderr[-1:]}')
    return ended


def wait_for_lines(process, path, count):
    """Wait until a file has `count` lines or the process has ended."""
    while process.poll() is None and not (path.is_file() and path.read_bytes().count(b'\n') >= count):
        time.sleep(0.01)


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.communicate()


@drill(24, 'SIGKILL in an evaluation and its sweep over needles, 3 times')
def killed_evaluation(folder: pathlib.Path) -> str:
    whole, killed = folder / 'whole', folder / 'killed'
    evaluated(whole)
    for name, count in (('ruler.jsonl', 1), ('needle.jsonl', 3), ('needle.jsonl', 7)):
        process = begin(killed)
        wait_for_lines(process, killed / name, count)
        kill(process)
        before = [set(path.read_bytes().splitlines()) for path in sorted(killed.glob('*.jsonl'))]
        kept = sum(map(len, before))
    ended = evaluated(killed)
    expect(not [line for line in ended.stderr if 'warning' in line], f'warnings: {ended.stderr[-3:]}')
    differ = [name for name in FILES if sha256(whole / name) != sha256(killed / name)]
    expect(not differ, f'{differ} differ from those of the uninterrupted evaluation')
    return f'equal files at the end; {kept} answers were kept at the last kill'


@drill(24, 'answers edited, taken for others and cut off, results edited; then both emptied')
def edited_files(folder: pathlib.Path) -> str:
    whole, copy = folder / 'whole', folder / 'copy'
    evaluated(whole)
    lines = (whole / 'needle.jsonl').read_text().splitlines(keepends=True)
    row = json.loads(lines[0])
    lines[0] = json.dumps({**row, 'text': row['outputs'][0]}) + '\n'  # a wrong answer made right by hand
    lines[1] = json.dumps({**row, 'index': 1}) + '\n'  # an answer that was given for another sample
    edited = {'needle.jsonl': ''.join(lines)[:-9],
              'results.json': (whole / 'results.json').read_text().replace('"mean": ', '"mean": 1')}
    count, named = len(lines), 0
    for texts, sentences in (
            (edited, ['line 1 was edited', 'line 2 was edited', f'line {count} is not valid JSON',
                      'the suite ruler', 'the suite needle']),
            ({'needle.jsonl': '', 'results.json': ''}, ['results.json is not valid JSON']),
            ({'needle.jsonl': ''}, [f'holds 0 of the {count} answers'])):
        shutil.copytree(whole, copy, dirs_exist_ok=True)
        for name, text in texts.items():
            (copy / name).write_text(text)
        ended = evaluated(copy)
        for sentence in sentences:
            expect(any(sentence in line for line in ended.stderr), f'no line has {sentence!r}')
            named += 1
        differ = [name for name in FILES if sha256(whole / name) != sha256(copy / name)]
        expect(not differ, f'{differ} differ from those of the undamaged evaluation')
    return f'{named} of {named} damages named in a line, and measured again to equal files'


@drill(24, 'the work directory of an evaluation is deleted while it runs')
def vanished(folder: pathlib.Path) -> str:
    process = begin(folder / 'run')
    wait_for_lines(process, folder / 'run/needle.jsonl', 2)
    shutil.rmtree(folder / 'run')
    ended = finish(process, LIMIT_S)
    own = [line for line in ended.stderr if line.startswith('error:')]
    expect(ended.status == 1 and len(own) == 1 and 'vanished' in own[0],
           f'status {ended.status}: {ended.stderr[-3:]}')
    return f'status 1: {own[0]}'


@drill(24, 'SIGKILL in an export to a Hugging Face folder, 5 times')
def killed_export(folder: pathlib.Path) -> str:
    arguments = [CONVERT, CHECKS.parent / 'base', folder / 'out', '--verify']
    rng, exported = random.Random(0), []
    for _ in range(5):
        process = start(arguments)
        while process.poll() is None and not list(folder.iterdir()):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))
        kill(process)
        if (folder / 'out').exists():  # then it must be whole
            exported.append(list(map(sha256, files_of(folder / 'out'))))
            shutil.rmtree(folder / 'out')
    ended = finish(start(arguments), LIMIT_S)
    expect(ended.status == 0, f'status {ended.status}: {ended.stderr[-1:]}')
    expect([path.name for path in folder.iterdir()] == ['out'], 'temporary folders are left')
    whole = list(map(sha256, files_of(folder / 'out')))
    expect(all(one == whole for one in exported), 'a killed export left a folder that is not whole')
    return (f'{5 - len(exported)} kills left no folder, {len(exported)} a whole one; the next export was '
            'verified by reading it again')
