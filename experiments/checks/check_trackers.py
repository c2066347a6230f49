"""Metrics and pictures arrive in the real packages of `extend.py --track`, without a network.

    pip install '.[wandb,mlflow,trackio]'
    python experiments/checks/check_trackers.py

Every package gets two calls of one run, as when a run continues, and is then asked for what it holds. wandb's
offline files are only seen to exist: nothing but its server reads them.
"""

import json
import os
import sqlite3
import sys
import tempfile
import time
from pathlib import Path

from lct.cli.main import run_script
from lct.train import trackers

STEPS = {1: (1, 2, 3), 2: (4, 5, 6)}  # of each call
PNG = bytes.fromhex(  # one grey pixel
    '89504e470d0a1a0a0000000d4948445200000001000000010800000000'
    '3a7e9b550000000a49444154789c636800000082008177cd72b60000000049454e44ae426082')


def send(name, folder):
    """Two calls of a run; returns the warnings."""
    picture, warnings = folder / 'needle.png', []
    picture.write_bytes(PNG)
    about = trackers.About('check', 'abc123def456', folder, {'seed': 1, 'stages': [{'name': '2K'}]})
    for steps in STEPS.values():
        tracker, = trackers.open_all([name], about, warnings.append)
        for step in steps:
            tracker.scalars(step, {'loss': 1 / step, 'stage 2K/loss': 1 / step, 'bad': float('nan')})
        tracker.image(steps[-1], 'needle', picture)
        tracker.close()
        time.sleep(1)  # wandb names the folder of a call by its second
    return warnings


def losses_of(name, folder):
    """[(step, loss)] as the package has them; None where only its server could tell."""
    if name == 'mlflow':
        import mlflow

        client = mlflow.MlflowClient()
        experiment = client.get_experiment_by_name(trackers.PROJECT)
        run, = client.search_runs([experiment.experiment_id])
        return sorted((metric.step, metric.value)
                      for metric in client.get_metric_history(run.info.run_id, 'loss'))
    if name == 'trackio':
        with sqlite3.connect(folder / 'trackio' / f'{trackers.PROJECT}.db') as database:
            rows = database.execute('SELECT step, metrics FROM metrics ORDER BY step').fetchall()
        return [(step, found['loss']) for step, text in rows if 'loss' in (found := json.loads(text))]
    assert len(list(folder.glob('wandb/offline-run-*-abc123def456/*.wandb'))) == len(STEPS)
    return None


def main():
    failed, trackers.CLOSE_S = [], 300.0  # a first call of mlflow makes its database
    for name in trackers.BACKENDS:
        with tempfile.TemporaryDirectory() as text:
            folder = Path(text)
            os.environ |= {'WANDB_MODE': 'offline', 'TRACKIO_DIR': str(folder / 'trackio'),
                           'MLFLOW_TRACKING_URI': f'sqlite:///{folder}/mlflow.db'}
            trackers.parse_names(name)
            warnings, found = send(name, folder), losses_of(name, folder)
            right = not warnings and found in (None, [(step, 1 / step) for step in range(1, 7)])
            print('ok   ' if right else 'FAIL ', name, *warnings, found or 'offline files written')
            failed += [name] * (not right)
    sys.exit(1 if failed else 0)


if __name__ == '__main__':
    run_script(main)
