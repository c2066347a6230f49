"""Drills of checkpoints: killed saves, damaged and missing files, full disks."""

import pathlib
import random
import signal
import time

from drill import TRAINING, drill, expect, start, training


@drill(1, 'SIGKILL at random times, 20 times')
def killed_saves(folder: pathlib.Path) -> str:
    whole = training(folder / 'whole', '--steps', 40, '--checkpoint-every', 1)
    expect(whole.weights, f'the uninterrupted run ended with status {whole.status}: {whole.stderr[-1:]}')
    rng = random.Random(0)
    for _ in range(20):
        process = start([TRAINING, folder / 'killed', '--steps', 40, '--checkpoint-every', 1])
        while process.poll() is None and not (folder / 'killed/checkpoints').exists():
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 3))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    end = training(folder / 'killed', '--steps', 40, '--checkpoint-every', 1)
    expect(end.weights == whole.weights, f'other weights, status {end.status}: {end.stderr[-1:]}')
    expect(not list((folder / 'killed/checkpoints').glob('*tmp*')), 'temporary folders are left')
    return 'equal weights at the end'
