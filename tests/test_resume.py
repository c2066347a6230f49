"""A run that is stopped, killed and run again ends with the weights of one that never was, bit for bit."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parent / 'tiny_training.py'
STEPS = 12


@pytest.fixture(scope='module')
def train(tmp_path_factory):
    """Runs the tiny training; flags make it send itself a signal. Returns output and exit code."""
    cache = tmp_path_factory.mktemp('compiled')
    environment = {**os.environ, 'JAX_COMPILATION_CACHE_DIR': str(cache),
                   'JAX_DISABLE_MOST_OPTIMIZATIONS': '1', 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}

    def run(workdir, *flags):
        process = subprocess.run([sys.executable, str(SCRIPT), str(workdir), *map(str, flags)], timeout=600,
                                 stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, text=True)
        return process.stdout, process.returncode

    return run


def weights(output):
    assert 'weights ' in output, output
    return output.split('weights ')[1].split()[0]


def continued_after(output):
    assert 'continuing after step ' in output, output
    return int(output.split('continuing after step ')[1].split()[0])


@pytest.fixture(scope='module')
def uninterrupted(train, tmp_path_factory):
    output, code = train(tmp_path_factory.mktemp('whole'))
    assert code == 0, output
    assert [f'| step {step}/' in output for step in range(1, STEPS + 1)] == [True] * STEPS, output
    return weights(output)


def test_killed_and_run_again_ends_with_the_same_bits(train, uninterrupted, tmp_path):
    seed = int(os.environ.get('LCT_KILL_SEED') or int.from_bytes(os.urandom(4), 'big'))
    draw = random.Random(seed)
    step, delay = draw.randint(5, 11), draw.uniform(0, 0.2)  # the delay: also while a checkpoint is written
    drawn = f'LCT_KILL_SEED={seed}: killed {delay:.3f}s after step {step}\n'
    output, code = train(tmp_path, step, int(signal.SIGKILL), delay)
    assert code == -signal.SIGKILL, drawn + output
    output, code = train(tmp_path)
    assert code == 0 and 4 <= continued_after(output) < STEPS, drawn + output
    assert weights(output) == uninterrupted, drawn + output
    rows = (tmp_path / 'metrics' / 'metrics.jsonl').read_text().splitlines()
    assert [json.loads(row)['step'] for row in rows] == list(range(1, STEPS + 1)), drawn + output


def test_sigterm_saves_says_how_to_continue_and_loses_no_step(train, uninterrupted, tmp_path):
    output, code = train(tmp_path, 2, int(signal.SIGTERM))
    assert code == 130 and 'run the same command to continue' in output, output
    saved = int(output.split('saved step ')[1].split()[0])
    assert 'SIGTERM: stopping after this step' in output and 2 <= saved <= 4, output
    output, code = train(tmp_path)
    assert continued_after(output) == saved
    assert weights(output) == uninterrupted
    again, code = train(tmp_path)  # a finished run is not trained again
    assert weights(again) == uninterrupted and '| step' not in again
