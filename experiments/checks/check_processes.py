"""Check that the main job has the same losses in one, two and four processes, even if killed and resumed.

    python experiments/checks/check_processes.py --workdir runs/processes

All runs use the same meshes on this machine; a killed run is resumed by another number of processes. The
config is smoke.py with more steps. Finished cases are kept, and the same command continues. Writes
results/processes.json.
"""

import argparse
import json
import os
import pathlib
import platform
import re
import signal
import subprocess
import sys
import time

import numpy as np

from lct.cli.main import run_script
from lct.cli.paths import experiments_folder

MESHES, STEPS = ('1,1,4,1', '2,1,2,1'), 10
CASES = {'1': (1,), '2': (2,), '4': (4,), '2, killed, then 4': (2, 4), '4, killed, then 1': (4, 1)}
KILL_AFTER = 13  # in the second stage
LIMIT_S = 7200  # for one run


def start(nprocs, workdir):
    """The main job by nprocs processes, as a Popen of the launcher, or of the job itself for one."""
    command = [experiments_folder() / 'extend.py', '--config', experiments_folder() / 'configs' / 'smoke.py',
               '--workdir', workdir,
               '--set', 'checkpoint_every=4', '--set', 'stages.1.batch_size=2']
    for i, mesh in enumerate(MESHES):
        command += ['--set', f'stages.{i}.mesh={mesh}', '--set', f'stages.{i}.num_steps={STEPS}']
    if nprocs > 1:
        command = [experiments_folder() / 'launch.py', '--nprocs', nprocs, *command]
    return subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


def losses(workdir):
    """{step: loss} that a run has written so far."""
    path = workdir / 'metrics' / 'metrics.jsonl'
    # the last line may be incomplete
    rows = re.findall(r'^\{.*\}$', path.read_text() if path.exists() else '', re.M)
    return {row['step']: row['loss'] for row in map(json.loads, rows)}


def kill_one(process, workdir):
    """Kill the last process of a launcher after step KILL_AFTER. Returns the last lines of its output."""
    while process.poll() is None and max(losses(workdir), default=0) < KILL_AFTER:
        time.sleep(0.1)
    children = pathlib.Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    output, _ = process.communicate(timeout=LIMIT_S)
    if process.returncode != 128 + signal.SIGKILL:
        raise ValueError(f'a process was killed but the launcher ended with {process.returncode}: '
                         f'{output[-2000:]}')
    return output.strip().splitlines()[-20:]


def perform(counts, workdir):
    """Run a case to its end. Returns its row of the table."""
    row = {}
    if len(counts) > 1 and not workdir.exists():
        row['launcher'] = next(line for line in kill_one(start(counts[0], workdir), workdir)
                               if 'launch:' in line)
    if not (workdir / 'results.json').exists():
        process = start(counts[-1], workdir)
        output, _ = process.communicate(timeout=LIMIT_S)
        if process.returncode:
            raise ValueError(f'{counts[-1]} processes ended with status {process.returncode}: '
                             f'{output[-3000:]}')
        row['continued'] = re.findall(r'continuing after step (\d+)', output)
    return row


def outcome(workdir):
    from safetensors.numpy import load_file

    results = json.loads((workdir / 'results.json').read_text())
    return {'losses': losses(workdir), 'curve': results['loss_by_position']['extended']['mean'],
            'needle': results['needle']['extended']['scores'], 'processes': results['num_processes'],
            'weights': load_file(workdir / 'model' / 'model.safetensors')}


def run():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--workdir', default='runs/processes')
    parser.add_argument('--only', choices=CASES, help='run one case only')
    args = parser.parse_args()
    workdir = pathlib.Path(args.workdir)
    folder = lambda name: workdir / re.sub(r'\W+', '-', name)
    notes_path = workdir / 'cases.json'
    notes = json.loads(notes_path.read_text()) if notes_path.exists() else {}
    workdir.mkdir(parents=True, exist_ok=True)
    for name in [args.only] if args.only else CASES:
        notes[name] = {**notes.get(name, {}), **perform(CASES[name], folder(name))}
        notes_path.write_text(json.dumps(notes))
    done = [name for name in CASES if (folder(name) / 'results.json').exists()]
    one, rows = outcome(folder('1')), []
    for name in done:
        other = outcome(folder(name))
        steps = sorted(one['losses'])
        rows.append({
            'processes': name, 'steps': len(other['losses']),
            'loss_difference': max(abs(one['losses'][s] - other['losses'][s]) for s in steps),
            'curve_difference': float(np.abs(np.subtract(one['curve'], other['curve'])).max()),
            'needles_equal': one['needle'] == other['needle'],
            'weight_difference': max(float(np.abs(one['weights'][k] - other['weights'][k]).max())
                                     for k in one['weights']),
            **{key: value for key, value in notes.get(name, {}).items() if value},
        })
        print(json.dumps(rows[-1]))
    result = {'meshes': MESHES, 'steps': 2 * STEPS, 'losses': [one['losses'][s]
                                                               for s in sorted(one['losses'])],
              'rows': rows, 'bar': 1e-5, 'holds': max(row['loss_difference'] for row in rows) <= 1e-5,
              'cpu': platform.processor() or platform.machine(), 'cores': os.cpu_count()}
    (experiments_folder() / 'results' / 'processes.json').write_text(json.dumps(result, indent=1))
    if not result['holds']:
        sys.exit(1)


if __name__ == '__main__':
    run_script(run)
