"""Drills of checkpoints: killed saves, damaged and missing files, full disks, other meshes and targets."""

import contextlib
import json
import pathlib
import random
import signal
import subprocess
import time

from drill import (
    CHECKS,
    TRAINING,
    NotHere,
    drill,
    expect,
    files_of,
    finish,
    flip_bit,
    start,
    training,
)

from lct import exit_status

LAUNCH = CHECKS.parent / 'launch.py'
SAVES = ('--checkpoint-every', 1)


@drill(1, 'SIGKILL at random times, 20 times')
def killed_saves(folder: pathlib.Path) -> str:
    whole = training(folder / 'whole', '--steps', 40, *SAVES)
    expect(whole.weights, f'the uninterrupted run ended with status {whole.status}: {whole.stderr[-1:]}')
    rng = random.Random(0)
    for _ in range(20):
        process = start([TRAINING, folder / 'killed', '--steps', 40, *SAVES])
        while process.poll() is None and not (folder / 'killed/checkpoints').exists():
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 3))
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
    end = training(folder / 'killed', '--steps', 40, *SAVES)
    expect(end.weights == whole.weights, f'other weights, status {end.status}: {end.stderr[-1:]}')
    expect(not list((folder / 'killed/checkpoints').glob('*tmp*')), 'temporary folders are left')
    return 'equal weights at the end'


def restores(folder, kind, *arguments):
    """Run drill_restores.py; returns the counts of its results."""
    ended = finish(start([CHECKS / 'drill_restores.py', folder, kind, *arguments]), limit_s=1800)
    expect(ended.status == 0 and ended.stdout, f'status {ended.status}: {ended.stderr[-1:]}')
    expect(len(ended.stderr) <= 3, f'{len(ended.stderr)} lines on stderr: {ended.stderr[:1]}')
    content = json.loads(ended.stdout[-1])
    expect(not content['problems'], f'{len(content["problems"])} wrong: {content["problems"][:1]}')
    return content['results'], content['classes']


@drill(6, 'one bit flipped in files of the newest checkpoint, 200 times')
def flipped_bits(folder: pathlib.Path) -> str:
    counts, classes = restores(folder, 'flips', '--trials', 200)
    return (f'{classes} classes of files: {counts.get("exact", 0)} restored bit for bit, '
            f'{counts.get("fell back", 0)} set aside, none silent')


@drill(6, 'whole runs after a flipped bit')
def runs_after_flips(folder: pathlib.Path) -> str:
    whole = training(folder / 'whole', '--checkpoint-every', 4)
    expect(whole.weights, f'the uninterrupted run ended with status {whole.status}: {whole.stderr[-1:]}')
    for name in ('state', 'record'):
        newest = folder / 'whole/checkpoints' / str(max(
            int(path.name) for path in (folder / 'whole/checkpoints').iterdir() if path.name.isdigit()))
        largest = max(files_of(newest / name), key=lambda path: path.stat().st_size)
        flip_bit(largest, 4 * largest.stat().st_size)
        again = training(folder / 'whole', '--checkpoint-every', 4)
        warnings = [line for line in again.stdout + again.stderr if 'WARNING' in line and 'damaged' in line]
        expect(again.status == 0 and again.weights == whole.weights,
               f'{name}: status {again.status}, {again.stderr[-1:]}')
        expect(len(warnings) == 1 and newest.with_name(f'{newest.name}.damaged').exists(),
               f'{name}: warnings {warnings}')
    return 'one WARNING line, equal weights at the end'


@drill(7, 'files of the newest checkpoint cut short, emptied, removed, unreadable')
def missing_files(folder: pathlib.Path) -> str:
    counts, _ = restores(folder, 'files')
    return f'{counts.get("fell back", 0)} set aside, {counts.get("exact", 0)} restored bit for bit'


@contextlib.contextmanager
def small_disk(folder, size):
    """A tmpfs of a size such as '2m' at folder; yields a function that changes its size."""
    folder.mkdir(parents=True)
    mounted = subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', str(folder)],
                             capture_output=True, check=False)
    if mounted.returncode:
        raise NotHere('only root may mount a small tmpfs')
    try:
        yield lambda size: subprocess.run(
            ['mount', '-o', f'remount,size={size}', str(folder)], check=True)
    finally:
        subprocess.run(['umount', '-l', str(folder)], check=True)


def on_small_disk(folder, disk):
    """A work directory whose checkpoints lie on a small disk."""
    folder.mkdir()
    (disk / 'checkpoints').mkdir()
    (folder / 'checkpoints').symlink_to(disk / 'checkpoints')
    return folder


def checkpoint_bytes(workdir):
    """The size on disk of the largest checkpoint."""
    return max(sum(file.stat().st_blocks * 512 for file in files_of(path))
               for path in (workdir / 'checkpoints').iterdir())


def steps_on(disk):
    return sorted(path.name for path in (disk / 'checkpoints').iterdir())


@drill(8, 'disk full while saving, room again')
def full_disk(folder: pathlib.Path) -> str:
    whole = training(folder / 'whole', *SAVES)
    size = checkpoint_bytes(folder / 'whole')
    with small_disk(folder / 'disk', int(1.6 * size)) as resize:
        workdir = on_small_disk(folder / 'run', folder / 'disk')
        process, failed, lines = start([TRAINING, workdir, *SAVES]), 0, []
        for line in process.stdout:
            lines.append(line)
            failed += 'WARNING' in line and 'could not be written' in line
            if failed == 2:
                resize(8 * size)
        process.wait(timeout=60)
        expect(failed >= 2, f'{failed} warnings of failed saves: {lines[-2:]}')
        weights = [line.split()[1] for line in lines if line.startswith('weights ')]
        expect(process.returncode == 0 and weights == [whole.weights], f'status {process.returncode}')
        kept = steps_on(folder / 'disk')
        expect(kept and all(name.isdigit() for name in kept), f'on disk: {kept}')
    return f'{failed} WARNING lines, saved again once there was room, equal weights'


@drill(8, 'disk full for good while saving')
def full_disk_for_good(folder: pathlib.Path) -> str:
    whole = training(folder / 'whole', *SAVES)
    size = checkpoint_bytes(folder / 'whole')
    with small_disk(folder / 'disk', int(1.6 * size)) as resize:
        workdir = on_small_disk(folder / 'run', folder / 'disk')
        ended = training(workdir, *SAVES)
        expect(ended.status == exit_status.UNWRITABLE, f'status {ended.status}: {ended.stderr[-1:]}')
        expect(len(ended.stderr) <= 3 and 'is on disk' in ended.stderr[-1], f'printed {ended.stderr}')
        kept = steps_on(folder / 'disk')
        expect(len(kept) == 1 and kept[0].isdigit(), f'on disk: {kept}')
        resize(8 * size)
        again = training(workdir, *SAVES)
        expect(again.weights == whole.weights, f'status {again.status}: {again.stderr[-1:]}')
    warned = sum('could not be written' in line for line in ended.stdout)
    return (f'{warned} WARNING lines, then status {ended.status}, step {kept[0]} kept; the same command ends '
            'with equal weights')


@drill(9, 'a checkpoint restored on other meshes')
def other_meshes(folder: pathlib.Path) -> str:
    counts, _ = restores(folder, 'meshes')
    expect(set(counts) == {'exact'}, str(counts))
    return f'{counts["exact"]} meshes of 1 to 8 devices: bit for bit, equal fingerprints'


@drill(9, 'two processes continue a run of one, and one a run of two')
def other_processes(folder: pathlib.Path) -> str:
    one, two = [TRAINING], [LAUNCH, '--nprocs', 2, TRAINING]
    found = []
    for first, then in ((one, two), (two, one)):
        workdir = folder / f'first_{len(first)}'
        for command in (first, then):
            ended = finish(start([*command, workdir, '--steps', 4]), limit_s=600)
            expect(ended.status == 0, f'status {ended.status}: {ended.stderr[-1:]}')
            found.append(ended.weights or ended.stdout[-1:])
    expect(found[0] == found[1] and found[2] == found[3] and found[0], f'weights {found}')
    return 'equal weights'


@drill(10, 'restored with another dtype, shape, vocabulary, set of arrays')
def other_targets(folder: pathlib.Path) -> str:
    counts, _ = restores(folder, 'targets')
    expect(set(counts) == {'refused'}, str(counts))
    return f'{counts["refused"]} refused in one sentence with the differences, nothing set aside'
