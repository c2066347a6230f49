"""Drills about the processes of a run: lost, missing, different, slow, or given the wrong place."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import threading
import time

from drill import TRAINING, Failed, drill, expect, finish, start

import lct
from lct.exit_status import ERROR, PEER_LOST, STOPPED

LIMIT_S = 600
LAUNCH = pathlib.Path(__file__).parents[1] / 'launch.py'
LONG = ('--steps', 100_000, '--checkpoint-every', 20)  # more than a drill waits for


def free_port():
    with socket.create_server(('127.0.0.1', 0)) as probe:
        return probe.getsockname()[1]


def group(places, port=None, environments=None, **more):
    """Start a process for each (index, count, arguments) of places; returns their Popen."""
    common = {'JAX_PLATFORMS': 'cpu', 'JAX_COORDINATOR_ADDRESS': f'127.0.0.1:{port or free_port()}', **more}
    environments = environments or [{}] * len(places)
    return [start([TRAINING, *arguments],
                  {**common, 'JAX_PROCESS_ID': str(index), 'JAX_NUM_PROCESSES': str(count), **own})
            for (index, count, arguments), own in zip(places, environments)]


def pair(first, second=None):
    """The places of two processes, with the arguments of each."""
    return [(0, 2, first), (1, 2, first if second is None else second)]


def errors_of(ended):
    """The lines on stderr without those about waiting and about slow compilations."""
    return [line for line in ended.stderr if line.strip() and not re.match(
        r"waiting |\[Gloo\]|\*{9}|\[Compiling|E\d+ .* slow_operation_alarm", line)]


def check_ends(group, expected, pattern):
    """Wait for the processes; each must end with its status and in one line that contains pattern."""
    ends = [finish(process, LIMIT_S) for process in group]
    for index, (ended, status) in enumerate(zip(ends, expected)):
        errors = errors_of(ended)
        expect(ended.status == status and len(errors) == 1 and re.search(pattern, errors[0]),
               f'process {index} ended with status {ended.status}, not {status}: {errors[-5:]}')
    return ends


def newest(workdir):
    """The newest complete checkpoint; 0 without one."""
    folder = workdir / 'checkpoints'
    return max((int(path.name) for path in folder.glob('[0-9]*') if path.name.isdigit()), default=0)


def wait_for_save(workdir, group):
    """Wait for a checkpoint that is newer than those there."""
    before, end = newest(workdir), time.monotonic() + LIMIT_S
    while newest(workdir) == before:
        over = [process for process in group if process.poll() is not None]
        if over or time.monotonic() > end:
            for process in group:
                process.kill()
            raise Failed(f'did not get that far: {[process.communicate()[1][-500:] for process in group]}')
        time.sleep(0.01)


# -- stopped and killed --------------------------------------------------------------------------------


@drill(2, 'SIGTERM to one of two processes')
def one_is_told_to_stop(folder):
    saved = 0
    for victim in (1, 0):
        processes = group(pair([folder / 'run', *LONG]))
        wait_for_save(folder / 'run', processes)
        processes[victim].send_signal(signal.SIGTERM)
        ends = [finish(process, LIMIT_S) for process in processes]
        text = '\n'.join(ends[0].stdout)
        expect([ended.status for ended in ends] == [STOPPED] * 2,
               f'statuses {[ended.status for ended in ends]}: {[ended.stderr[-3:] for ended in ends]}')
        match = re.search(r'saved step (\d+) of', text)
        expect(match and int(match[1]) == newest(folder / 'run'), f'it said {text[-300:]!r}')
        expect(not saved or f'continuing after step {saved} of' in text, f'began with {text[:300]!r}')
        saved = int(match[1])
    rows = (folder / 'run' / 'metrics' / 'metrics.jsonl').read_text().splitlines()
    steps = [json.loads(row)['step'] for row in rows]
    expect(steps == list(range(1, saved + 1)), 'the steps in metrics.jsonl are not consecutive')
    return f'both saved step {saved} and ended with {STOPPED}; the second run lost no step'


@drill(4, 'kill -9 of one of two processes right after a save')
def one_is_killed(folder):
    steps = []
    for victim in (1, 0):
        processes = group(pair([folder / 'run', *LONG]))
        wait_for_save(folder / 'run', processes)
        processes[victim].kill()
        began = time.monotonic()
        ended = finish(processes[1 - victim], 60)
        seconds = time.monotonic() - began
        finish(processes[victim])
        lines = errors_of(ended)
        expect(ended.status == PEER_LOST and len(lines) == 1 and seconds < 30,
               f'the survivor ended with {ended.status} after {seconds:.0f} s: {lines[-5:]}')
        match = re.search(rf'process {victim} \(.*\) of 2 is gone; checkpoints up to step (\d+) are '
                          'complete, and the same command continues', lines[0])
        expect(match and int(match[1]) == newest(folder / 'run'), f'it said {lines[0]!r}')
        steps.append(f'{match[1]} in {seconds:.1f} s')
    launcher = start([LAUNCH, '--nprocs', 2, TRAINING, folder / 'run', *LONG])
    wait_for_save(folder / 'run', [launcher])
    children = pathlib.Path(f'/proc/{launcher.pid}/task/{launcher.pid}/children').read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    ended = finish(launcher, 60)
    own = [line for line in (*ended.stdout, *ended.stderr) if re.search('gone|launch:|error', line)]
    expect(ended.status == 128 + signal.SIGKILL and len(errors_of(ended)) <= 3 and len(own) <= 3
           and 'the same command continues' in own[-1], f'the launcher printed {own} {ended.stderr[-5:]}')
    return f'one line each, with the step saved ({", ".join(steps)}); launch.py: {own[-1]!r}'


# -- different -----------------------------------------------------------------------------------------


@drill(17, 'other code, package versions, flags, seed or work directory in one process')
def one_is_different(folder):
    code, version = folder / 'code', folder / 'version'
    shutil.copytree(pathlib.Path(lct.__file__).parent, code / 'lct')
    with (code / 'lct' / 'ops' / 'norms.py').open('a') as file:
        file.write('\n# other code\n')
    (version / 'optax-0.0.1.dist-info').mkdir(parents=True)
    (version / 'optax-0.0.1.dist-info' / 'METADATA').write_text('Name: optax\nVersion: 0.0.1\n')
    path = lambda first: {'PYTHONPATH': os.pathsep.join([str(first), os.environ.get('PYTHONPATH', '')])}
    cases = {
        'code': (pair([folder / 'a']), path(code), r'the code of lct/ops/norms.py is \w+ in process 0 \('),
        'version': (pair([folder / 'b']), path(version), r'optax is [\d.]+ in process 0 \(.* but 0.0.1 '),
        'flags': (pair([folder / 'c']), {'XLA_FLAGS': '--xla_cpu_enable_fast_math=true'},
                  'XLA_FLAGS is empty in process 0 .* but --xla_cpu_enable_fast_math=true in process 1'),
        'config': (pair([folder / 'd'], [folder / 'd', '--steps', 7]), {}, 'steps is 6 in .* but 7 in'),
        'seed': (pair([folder / 'e'], [folder / 'e', '--seed', 1]), {}, 'seed is 0 in .* but 1 in'),
        'work directory': (pair([folder / 'f'], [folder / 'g']), {'LCT_FOLDER_TIMEOUT_S': '3'},
                           f'{folder / "f"} of process 0 .* is not the folder {folder / "g"} of process 1'),
    }
    for places, environment, pattern in cases.values():
        check_ends(group(places, environments=[{}, environment]), [ERROR, ERROR], pattern)
    return f'refused at the start in one line that names both: {", ".join(cases)}'


# -- the wrong place -----------------------------------------------------------------------------------


@drill(20, 'a port in use, an absent process, a wrong or repeated number')
def the_wrong_place(folder):
    run, soon = [folder / 'run'], {'LCT_JOIN_TIMEOUT_S': '12'}
    with socket.create_server(('127.0.0.1', 0)) as taken:
        port = taken.getsockname()[1]
        for _ in range(2):  # five at a time: ten in all
            check_ends(group([(0, 2, run)] * 5, port), [ERROR] * 5, f'cannot listen at .*:{port} .* in use')
        check_ends(group([(1, 2, run)], port, **soon), [PEER_LOST], f'not reach process 0 at .*:{port} ')
    absent = check_ends(group([(0, 3, run), (2, 3, run)], **soon), [PEER_LOST] * 2,
                        'process 1 of 3 did not come to .* within 12 s')
    expect(any('waiting at 127.0.0.1' in line for line in absent[0].stderr), 'process 0 did not say it waits')
    check_ends(group([(1, 2, run)], **soon), [PEER_LOST], r'did not reach process 0 .*Connection refused')
    check_ends(group([(2, 2, run)]), [ERROR], 'JAX_PROCESS_ID=2 of JAX_NUM_PROCESSES=2 must be')
    check_ends(group([(0, 3, run), (1, 3, run), (1, 3, run)]), [ERROR] * 3, 'are process 1 of 3; give each')
    check_ends(group([(0, 2, run), (1, 3, run)]), [ERROR] * 2, r'was started as one of 3 but process 0 \(')
    seconds = max(ended.seconds for ended in absent)
    return f'one line each, 10 of 10 with the port in use; an absent process is named after {seconds:.0f} s'


# -- slow ----------------------------------------------------------------------------------------------


@drill(21, 'one of two processes runs at a tenth of its speed')
def one_is_slow(folder):
    processes = group(pair([folder / 'run', *LONG]))
    wait_for_save(folder / 'run', processes)
    done, lines = threading.Event(), []

    def slow_down():
        while not done.wait(0.003):
            processes[1].send_signal(signal.SIGSTOP)
            done.wait(0.03)
            processes[1].send_signal(signal.SIGCONT)

    def read():
        for line in processes[0].stdout:
            lines.append(line)
            if 'WARNING: slow: process 1' in line:
                break
        done.set()

    brake = threading.Thread(target=slow_down)
    reader = threading.Thread(target=read, daemon=True)
    brake.start()
    reader.start()
    reader.join(LIMIT_S / 2)
    done.set()
    brake.join()
    ended = [process.poll() for process in processes]
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()
    expect(ended == [None, None], f'the processes ended with {ended}')
    expect(lines and 'WARNING: slow: process 1' in lines[-1], f'no line named it; the last was {lines[-1:]}')
    return lines[-1].strip()
