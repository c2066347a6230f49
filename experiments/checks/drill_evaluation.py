"""Drills of evaluations and exports: killed, edited, emptied and deleted under their feet."""

import json
import pathlib
import random
import shutil
import signal
import time

from drill import CHECKS, drill, expect, files_of, finish, sha256, start

EVALUATE, CONVERT = CHECKS.parent / 'evaluate.py', CHECKS.parent / 'convert_weights.py'
FLAGS = ('--model', 'base', '--suite', 'ruler,needle', '--tasks', 'niah_single_1,vt,needle',
         '--lengths', '512', '--samples', 2, '--batch-tokens', 1024)
FILES = ('ruler.jsonl', 'needle.jsonl', 'results.json', 'results.csv', 'report.html')


def begin(workdir, *flags):
    return start([EVALUATE, *FLAGS, '--workdir', workdir, *flags])


def evaluated(workdir):
    """Run the evaluation to its end, which must be a good one."""
    ended = finish(begin(workdir))
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
    for name, count in (('ruler.jsonl', 1), ('needle.jsonl', 3), ('needle.jsonl', 12)):
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


@drill(24, 'answers edited, swapped, emptied and deleted; results edited; results emptied')
def edited_files(folder: pathlib.Path) -> str:
    whole = folder / 'whole'
    evaluated(whole)
    lines = (whole / 'needle.jsonl').read_text().splitlines(keepends=True)
    row = json.loads(lines[0])
    right = json.dumps({**row, 'text': row['outputs'][0]}) + '\n'  # a wrong answer made right by hand
    other = json.dumps({**row, 'index': 1, 'outputs': ['1']}) + '\n'  # an answer given for another sample
    results = (whole / 'results.json').read_text()
    cases = {
        'a right answer': ('needle.jsonl', ''.join([right, *lines[1:]]), 'line 1 was edited'),
        'another sample': ('needle.jsonl', ''.join([lines[0], other, *lines[2:]]), 'line 2 was edited'),
        'emptied': ('needle.jsonl', '', f'holds 0 of the {len(lines)} answers'),
        'deleted': ('needle.jsonl', None, f'holds 0 of the {len(lines)} answers'),
        'truncated': ('needle.jsonl', ''.join(lines)[:-9], f'line {len(lines)} is not valid JSON'),
        'results': ('results.json', results.replace('"mean": ', '"mean": 1'), 'were edited, or belong to'),
        'no results': ('results.json', results[:99], 'results.json is not valid JSON'),
    }
    for case, (name, text, sentence) in cases.items():
        copy = shutil.copytree(whole, folder / 'copy')
        (copy / name).unlink()
        if text is not None:
            (copy / name).write_text(text)
        ended = evaluated(copy)
        expect(sum(sentence in line for line in ended.stderr), f'{case}: no line has {sentence!r}')
        differ = [one for one in FILES if sha256(whole / one) != sha256(copy / one)]
        expect(not differ, f'{case}: {differ} differ')
        shutil.rmtree(copy)
    return f'{len(cases)} of {len(cases)} said in a line and measured again to equal files'


@drill(24, 'the work directory of an evaluation is deleted while it runs')
def vanished(folder: pathlib.Path) -> str:
    process = begin(folder / 'run')
    wait_for_lines(process, folder / 'run/needle.jsonl', 2)
    shutil.rmtree(folder / 'run')
    ended = finish(process)
    own = [line for line in ended.stderr if line.startswith('error:')]
    expect(ended.status == 1 and len(own) == 1 and 'vanished' in own[0],
           f'status {ended.status}: {ended.stderr[-3:]}')
    return f'status 1: {own[0]}'


@drill(24, 'SIGKILL in an export to a Hugging Face folder, 5 times')
def killed_export(folder: pathlib.Path) -> str:
    arguments = [CONVERT, CHECKS.parent / 'base', folder / 'out', '--verify']
    rng, absent = random.Random(0), 0
    for _ in range(5):
        process = start(arguments)
        while process.poll() is None and not list(folder.iterdir()):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))
        kill(process)
        absent += not (folder / 'out').exists()
        if (folder / 'out').exists():  # then it is whole
            again = finish(start([CONVERT, folder / 'out', folder / 'copy', '--verify']))
            expect(again.status == 0, f'a folder that cannot be read: {again.stderr[-1:]}')
            shutil.rmtree(folder / 'out')
            shutil.rmtree(folder / 'copy')
    ended = finish(start(arguments))
    expect(ended.status == 0, f'status {ended.status}: {ended.stderr[-1:]}')
    expect([path.name for path in folder.iterdir()] == ['out'], 'temporary folders are left')
    base = CHECKS.parent / 'base/model.safetensors'
    exported = [path for path in files_of(folder / 'out') if path.suffix == '.safetensors']
    expect(sum(path.stat().st_size for path in exported) > base.stat().st_size // 2, 'too small')
    return f'atomic: {absent} kills left no folder, {5 - absent} a whole one; then verified by reading it again'
