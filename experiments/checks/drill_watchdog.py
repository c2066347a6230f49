"""Drills of hangs, signals, data that go away, metrics and the compilation cache."""

import contextlib
import os
import pathlib
import re
import signal
import struct
import subprocess
import sys

from drill import TRAINING, Failed, NotHere, drill, expect, files_of, finish, flip_bit, start, training

from lct import exit_status

LIMIT_S = 900
LAUNCH = pathlib.Path(__file__).parents[1] / 'launch.py'
BUDGETS = 'step=10,data=10'
PHASES = ('compile', 'data', 'step', 'save')


def whole(folder, *arguments):
    """The weights of a run without a fault."""
    ended = training(folder / 'whole', *arguments, limit_s=LIMIT_S)
    expect(ended.weights, f'the run without a fault ended with status {ended.status}: {ended.stderr[-1:]}')
    return ended.weights


def parallel(*arguments):
    """The ends of several runs of drill_training.py that run at the same time."""
    runs = [start([TRAINING, *each]) for each in arguments]
    return [finish(each, LIMIT_S) for each in runs]


@drill(3, 'one signal in a compilation, a wait for data, a step, a save')
def signals(folder: pathlib.Path) -> str:
    expected, names = whole(folder), ('TERM', 'HUP', 'INT', 'USR1')
    runs = parallel(*((folder / phase, '--fault', f'{name}@{phase}') for phase, name in zip(PHASES, names)))
    for phase, name, ended in zip(PHASES, names, runs):
        expect(ended.status == exit_status.STOPPED, f'{name} in {phase}: status {ended.status}')
        expect(any(f'SIG{name}: stopping after this step' in line for line in ended.stderr),
               f'{name} in {phase}: {ended.stderr[-2:]}')
        expect('the same command' in ended.stdout[-1] or 'run the same command' in ended.stdout[-1],
               f'{name} in {phase}: {ended.stdout[-1:]}')
        expect('saved step' in ended.stdout[-1], f'{name} in {phase} saved nothing: {ended.stdout[-1:]}')
    for phase, ended in zip(PHASES, parallel(*((folder / phase,) for phase in PHASES))):
        expect(ended.weights == expected, f'other weights after {phase}, status {ended.status}')
    return 'status 130, all saved, equal weights at the end'


@drill(3, 'two signals in a compilation, a wait for data, a step, a save')
def second_signals(folder: pathlib.Path) -> str:
    twice = ('TERM,TERM', 'USR1,TERM', 'INT,INT', 'TERM,INT')
    runs = parallel(*((folder / phase, '--fault', f'{names}@{phase}') for phase, names in zip(PHASES, twice)))
    for phase, names, ended in zip(PHASES, twice, runs):
        last = ended.stderr[-1] if ended.stderr else ''
        expect(ended.status == exit_status.STOPPED and f'SIG{names.split(",")[1]}: stopped at once' in last,
               f'{names} in {phase}: status {ended.status}, {last}')
        # a wait for data ends with the first signal: the second comes in the save, or after it
        expect(phase == 'data' or f'in phase {phase}' in last, f'{names} in {phase}: {last}')
    return 'status 130 and one line at once'


@drill(3, 'SIGTERM in the evaluation of the base model')
def signal_in_evaluation(folder: pathlib.Path) -> str:
    script = LAUNCH.with_name('extend.py')
    process = start([script, '--config', script.parent / 'configs/smoke.py', '--workdir', folder / 'run'])
    for line in process.stdout:
        if 'recall probe, base' in line:
            break
    process.send_signal(signal.SIGTERM)
    ended = finish(process, LIMIT_S)
    expect(ended.status == exit_status.STOPPED, f'status {ended.status}: {ended.stderr[-1:]}')
    expect(any('nothing to save' in line for line in ended.stderr), f'{ended.stderr}')
    return ended.stdout[-1]


def two_processes(folder, *arguments):
    """Two processes of one run, started without the launcher."""
    sys.path.insert(0, str(LAUNCH.parent))
    import launch

    port = launch.free_port(0)
    return [start([TRAINING, folder / 'run', *arguments], launch.process_environment(i, 2, port))
            for i in range(2)]


@drill(5, 'one of two processes hangs in its loader')
def hang(folder: pathlib.Path) -> str:
    group = two_processes(folder, '--mesh', '1,1,2,1', '--watchdog', BUDGETS, '--fault', 'hang-data@6/1')
    ended = [finish(process, LIMIT_S) for process in group]
    statuses = [each.status for each in ended]
    expect(statuses == [exit_status.STUCK] * 2, f'statuses {statuses}: {[e.stderr[-2:] for e in ended]}')
    for i, each in enumerate(ended):
        lines = [line for line in each.stderr if line.startswith('stuck:')]
        expect(len(lines) == 2 and f'process {i}, phase' in lines[0], f'process {i}: {each.stderr}')
        expect((folder / f'run/stacks_{i}.txt').stat().st_size, f'process {i} has written no stacks')
    phases = [re.search('phase ([a-z]+)', each.stderr[-2])[1] for each in ended]
    expect(phases == ['step', 'data'], f'phases {phases}')
    return 'both ended with status 75, phases step and data'


@drill(5, 'SIGSTOP of one of two processes under the launcher')
def stopped_peer(folder: pathlib.Path) -> str:
    process = start([LAUNCH, '--nprocs', 2, TRAINING, folder / 'run', '--steps', 100000, '--checkpoint-every',
                     100000, '--watchdog', BUDGETS])
    for line in process.stdout:
        if '| step 8/' in line:
            break
    children = subprocess.run(['pgrep', '-P', str(process.pid)], capture_output=True, text=True, timeout=30)
    peer = int(children.stdout.split()[1])
    os.kill(peer, signal.SIGSTOP)
    try:
        ended = finish(process, LIMIT_S)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(peer, signal.SIGKILL)
    expect(ended.status == exit_status.STUCK, f'status {ended.status}: {ended.stderr[-3:]}')
    return f'status 75 after {ended.seconds:.0f} s, both ended'


def fill(path):
    """Write a file until the disk is full."""
    with contextlib.suppress(OSError), path.open('wb', buffering=0) as file:
        while file.write(bytes(1024)):
            pass


@drill(8, 'the disk of the metrics is full, then has room again')
def full_metrics(folder: pathlib.Path) -> str:
    metrics, filler = folder / 'run/metrics', folder / 'run/metrics/filler'
    metrics.mkdir(parents=True)
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=8m', 'tmpfs', str(metrics)]
    if subprocess.run(mount, capture_output=True, timeout=30, check=False).returncode:
        raise NotHere('mounting a small tmpfs, which needs root')
    try:
        process = start([TRAINING, folder / 'run', '--steps', 1500, '--checkpoint-every', 10000])
        for line in process.stdout:
            if '| step 20/' in line:
                fill(filler)
            if '| step 400/' in line:
                filler.unlink()
        ended = finish(process, LIMIT_S)
        expect(ended.status == 0, f'status {ended.status}: {ended.stderr[-2:]}')
        steps = [int(row.split(b'"step": ')[1].split(b',')[0])
                 for row in (metrics / 'metrics.jsonl').read_bytes().splitlines()]
    finally:
        subprocess.run(['umount', str(metrics)], timeout=30, check=True)
    expect(steps == sorted(set(steps)) and steps[-1] == 3000, f'{len(steps)} rows, the last {steps[-1]}')
    return f'trained on; {len(steps)} of 3000 rows'


@drill(15, 'the data cannot be read for 3 s, or any more')
def lost_data(folder: pathlib.Path) -> str:
    expected = whole(folder)
    stalled, lost = parallel((folder / 'stalled', '--fault', 'stall-data@4'),
                             (folder / 'lost', '--fault', 'lose-data@5', '--watchdog', 'data=200'))
    warnings = [line for line in stalled.stderr if 'WARNING' in line]
    expect(stalled.weights == expected and len(warnings) == 1, f'stall: status {stalled.status}, {warnings}')
    expect(lost.status == exit_status.ERROR and 'the data cannot be read' in lost.stderr[-1],
           f'status {lost.status}: {lost.stderr[-2:]}')
    again = training(folder / 'lost', limit_s=LIMIT_S)
    expect(again.weights == expected, f'status {again.status} after the data were back')
    expect('continuing after step 4 ' in '\n'.join(again.stdout), 'steps before the loss were not saved')
    return 'read again after 3 s; lost for good: one sentence, steps saved, equal weights at the end'


@drill(21, 'the clock jumps a day back and months ahead')
def clock_jump(folder: pathlib.Path) -> str:
    expected = whole(folder)
    ended = training(folder / 'run', '--fault', 'clock@3', '--watchdog',
                     'set_up=200,compile=200,step=100,data=100,save=100', limit_s=LIMIT_S)
    expect(ended.weights == expected, f'status {ended.status}: {ended.stderr[-2:]}')
    return 'not noticed'


def curve(folder):
    """The steps of the loss as TensorBoard shows them: what is behind a purged step is hidden."""
    from tensorboardX.proto.event_pb2 import Event

    shown = []
    for path in sorted(folder.glob('events*')):
        data = path.read_bytes()
        while data:
            size, = struct.unpack('<Q', data[:8])
            event, data = Event.FromString(data[12:12 + size]), data[16 + size:]
            if event.HasField('session_log'):
                shown = [step for step in shown if step < event.step]
            shown += [event.step for value in event.summary.value if value.tag == 'loss']
    return shown


@drill(26, 'TensorBoard and metrics.jsonl after SIGKILL and a continuation')
def curves(folder: pathlib.Path) -> str:
    process = start([TRAINING, folder, '--steps', 60, '--checkpoint-every', 25])
    for line in process.stdout:
        if '| step 40/' in line:
            break
    process.kill()
    finish(process)
    ended = training(folder, '--steps', 60, '--checkpoint-every', 25, limit_s=LIMIT_S)
    expect(ended.weights, f'status {ended.status}: {ended.stderr[-1:]}')
    steps = curve(folder / 'metrics')
    expect(steps == list(range(1, 121)), f'the curve of the loss has steps {steps}')
    rows = (folder / 'metrics/metrics.jsonl').read_text().splitlines()
    expect([int(re.search('"step": ([0-9]+)', row)[1]) for row in rows] == steps, f'{len(rows)} rows')
    return 'each step once'


@drill(27, 'every entry of the compilation cache is damaged')
def damaged_cache(folder: pathlib.Path) -> str:
    cache = {'JAX_COMPILATION_CACHE_DIR': str(folder / 'cache'),
             'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
             'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1'}
    first = training(folder / 'first', limit_s=LIMIT_S, **cache)
    entries = [path for path in files_of(folder / 'cache') if path.name.endswith('-cache')]
    if not entries:
        raise Failed(f'no cache was written, status {first.status}')
    for i, path in enumerate(entries):
        if i % 2:
            flip_bit(path, 4 * path.stat().st_size)
        else:
            path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    again = training(folder / 'again', limit_s=LIMIT_S, **cache)
    expect(first.weights == again.weights != '', f'status {again.status}: {again.stderr[-2:]}')
    warned = [line for line in again.stderr if 'cache' in line]
    return f'{len(entries)} entries compiled again, {len(warned)} lines of warnings, equal weights'
