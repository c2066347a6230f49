"""A run that is stopped, killed and run again ends with the weights of one that never was, bit for bit."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parent / 'tiny_training.py'


@pytest.fixture(scope='module')
def train(tmp_path_factory):
    """Runs the tiny training; sends a signal once a step is reported. Returns output and exit code."""
    cache = tmp_path_factory.mktemp('compiled')
    environment = {**os.environ, 'JAX_COMPILATION_CACHE_DIR': str(cache), 'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
                   'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}

    def run(workdir, stop_after=None, how=None):
        process = subprocess.Popen([sys.executable, str(SCRIPT), str(workdir)], stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT, text=True, env=environment)
        lines = []
        for line in process.stdout:
            lines.append(line)
            if stop_after is not None and f'| step {stop_after}/' in line:
                process.send_signal(how)
                stop_after = None
        return ''.join(lines), process.wait()

    return run


def weights(output):
    return output.split('weights ')[1].split()[0]


@pytest.fixture(scope='module')
def uninterrupted(train, tmp_path_factory):
    output, code = train(tmp_path_factory.mktemp('whole'))
    assert code == 0, output
    return weights(output)


@pytest.mark.parametrize('killed_after', [2, 7])  # in the first stage and, on another mesh, in the second
def test_killed_and_run_again_ends_with_the_same_bits(train, uninterrupted, tmp_path, killed_after):
    output, code = train(tmp_path, stop_after=killed_after, how=signal.SIGKILL)
    assert code == -signal.SIGKILL, output
    output, code = train(tmp_path)
    assert weights(output) == uninterrupted


def test_sigterm_saves_says_how_to_continue_and_loses_no_step(train, uninterrupted, tmp_path):
    output, code = train(tmp_path, stop_after=1, how=signal.SIGTERM)
    assert code == 130 and 'run the same command to continue' in output, output
    saved = int(output.split('saved step ')[1].split()[0])
    output, code = train(tmp_path)
    assert f'continuing after step {saved} of 12' in output
    assert weights(output) == uninterrupted
    again, code = train(tmp_path)  # a finished run is not trained again
    assert weights(again) == uninterrupted and '| step' not in again
