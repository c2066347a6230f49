"""Several processes: how they find each other, that they train like one, and how they stop and fail."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest
import tiny_processes
import yaml
from jax.experimental import mesh_utils

from lct import clusters, exit_status, processes, sharding
from lct.train import checkpoint, straggler

ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / 'experiments' / 'launch.py'
LAUNCHERS = ROOT / 'experiments' / 'launchers'


def launch(*arguments, **more):
    environment = {name: value for name, value in os.environ.items() if name != 'XLA_FLAGS'}
    return subprocess.Popen([sys.executable, LAUNCH, *map(str, arguments)], env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more)


def ended(process, timeout=200):
    """(exit status, stdout, stderr) of a launched group."""
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


@pytest.fixture
def script(tmp_path):
    """A Python script of the given text, which finds its number in `index`."""
    def make(text):
        path = tmp_path / 'script.py'
        path.write_text(f'import os, signal, sys, time\nindex = int(os.environ["JAX_PROCESS_ID"])\n{text}\n')
        return path

    return make


# -- training ------------------------------------------------------------------------------------------


def losses(workdir):
    rows = (workdir / 'metrics' / 'metrics.jsonl').read_text().splitlines()
    return {row['step']: row['loss'] for row in map(json.loads, rows)}


def test_two_processes_train_like_one_stop_together_and_are_continued_by_one(tmp_path):
    group = launch('--nprocs', 2, ROOT / 'tests' / 'tiny_processes.py', tmp_path / 'two', 2)
    _, params, _ = tiny_processes.train(tmp_path / 'one')
    status, out, err = ended(group)
    assert status == 130, out + err
    # the signal came to the second process alone, after it had reported step 2: both stop at one step, saved
    saved = int(re.search(r'saved step (\d+) of 6', out)[1])
    assert 3 <= saved <= 4, out
    assert f'weights {tiny_processes.initial_weights()}' in out
    one, two = losses(tmp_path / 'one'), losses(tmp_path / 'two')
    assert sorted(two) == list(range(1, saved + 1))
    np.testing.assert_allclose([two[step] for step in two], [one[step] for step in two], atol=1e-5, rtol=0)

    _, continued, _ = tiny_processes.train(tmp_path / 'two')
    two = losses(tmp_path / 'two')
    assert sorted(two) == sorted(one) == list(range(1, 7))
    np.testing.assert_allclose([two[step] for step in one], [one[step] for step in one], atol=1e-5, rtol=0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), continued, params)


def windows(*rows):
    return {i: dict(enumerate([{'probe_s': p, 'input_s': w} for p, w in row])) for i, row in enumerate(rows)}


def test_a_slow_host_is_named_once_it_is_slow_in_most_of_a_window(monkeypatch):
    monkeypatch.setattr(processes, 'name_of', lambda index: f'process {index} (n{index})')
    even, slow, late = [(0.010, 0.0)] * 3, [(0.010, 0), (0.1, 0), (0.1, 0)], [(0.01, 0.3)] * 3
    assert straggler.compare(windows(even, even, [(0.1, 0.0), (0.01, 0.0), (0.014, 0.0)]), 1.0) is None
    assert straggler.compare(windows(even, slow[:2]), 1.0) is None
    assert straggler.compare(windows(even, slow), 1.0) == (
        'slow: process 1 (n1) takes 100 ms for what takes the others 10 ms; all others wait for it in every '
        'step')
    assert 'process 2 (n2) waits 300 ms of each step for its input, the others 0 ms' in straggler.compare(
        windows(even, even, late), 1.0)
    assert straggler.compare(windows(even, even, late), 2.0) is None


def test_the_speed_of_a_process_is_measured_beside_the_mesh_of_its_steps(monkeypatch):
    reported = {}
    monkeypatch.setattr(processes, 'measures_others', lambda: True)
    monkeypatch.setattr(processes, 'report', lambda **values: reported.update(values))
    monkeypatch.setattr(processes, 'reports', lambda: {0: reported})
    with jax.set_mesh(sharding.make_mesh((1, 1, 2, 1))):
        check = straggler.StragglerCheck()
        assert check.measure(4, 1.0) is None and not reported
        assert check.measure(6, 2.0) is None
    assert reported['step'] == 6 and reported['input_s'] == 0.5 and reported['probe_s'] > 0


# -- the launcher --------------------------------------------------------------------------------------


def test_one_that_dies_ends_all_and_its_last_lines_are_shown(script):
    begin = time.monotonic()
    path = script('print("hello from", index)\nif index == 1:\n    print("no more memory")\n    sys.exit(3)\n'
                  'time.sleep(60)')
    status, out, err = ended(launch('--nprocs', 3, path))
    assert status == 3 and time.monotonic() - begin < 20
    assert out == 'hello from 0\n'
    assert 'process 1 of 3 ended with exit status 3; the others were ended' in err and 'no more memory' in err


def test_one_that_is_killed_is_named_with_its_signal_and_not_the_one_that_aborts_for_it(script, tmp_path):
    path = script(f'dying = {str(tmp_path / "dying")!r}\n'
                  'if index == 1:\n    open(dying, "w").close()\n    os.kill(os.getpid(), signal.SIGKILL)\n'
                  'while not os.path.exists(dying): time.sleep(.001)\nos.abort()')
    status, _, err = ended(launch('--nprocs', 2, path))
    assert status == 128 + 9 and 'process 1 of 2 was ended by SIGKILL' in err
    assert 'the same command continues' in err and len(err.splitlines()) == 1


def test_a_signal_reaches_every_process_once_and_all_may_finish(script):
    path = script('got = []\nsignal.signal(signal.SIGINT, lambda *_: got.append(1))\n'
                  'print("ready", flush=True)\n'
                  'end = time.monotonic() + 30\nwhile not got and time.monotonic() < end: time.sleep(.02)\n'
                  'time.sleep(.4)\nprint("got", len(got))\nsys.exit(130)')
    group = launch('--nprocs', 2, '--all', path, start_new_session=True)
    ready = [group.stdout.readline(), group.stdout.readline()]
    os.killpg(group.pid, signal.SIGINT)  # as a terminal does: to the whole foreground group
    status, out, _ = ended(group)
    assert sorted(ready) == ['[0] ready\n', '[1] ready\n']
    assert status == 130 and sorted(out.splitlines()) == ['[0] got 1', '[1] got 1']


@pytest.mark.parametrize(('arguments', 'message'), [
    (('--nprocs', '0', LAUNCH), '--nprocs 0 must be at least 1'),
    (('--nprocs', 'two', LAUNCH), "invalid int value: 'two'"),
    (('--nprocs', '2', 'nowhere.py'), 'script nowhere.py does not exist'),
    (('--nprocs', '2', '--port', '70000', LAUNCH), '--port 70000 cannot be used'),
])
def test_what_cannot_be_launched(arguments, message):
    status, out, err = ended(launch(*arguments))
    assert status != 0 and not out and message in err


def test_a_port_in_use():
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        taken.listen()
        port = taken.getsockname()[1]
        status, _, err = ended(launch('--nprocs', 2, '--port', port, LAUNCH))
    assert status == 1 and f'--port {port} cannot be used' in err and 'leave it out' in err


# -- clusters and meshes -------------------------------------------------------------------------------


def test_alone_a_process_agrees_with_itself():
    stop_requested = []
    answer = processes.anyone(stop_requested)
    stop_requested.append('SIGTERM')
    assert answer and processes.from_first(7) == 7 and processes.is_first()
    processes.check_same({'a': 1}, 'their config')
    processes.check_same_folder('nowhere')
    error = ValueError('Gloo')
    assert processes.explain(error) is error


class Pretended:
    """Peers of which another one has given its values already."""

    def __init__(self, *others):
        self.others, self.at_loss = list(others), lambda: 'the same command continues'

    def agree(self, value, judge, name):
        return judge([value, self.others.pop(0)], ['process 0 (a)', 'process 1 (b)'])


@pytest.fixture
def two(monkeypatch):
    def pretend(*others):
        monkeypatch.setattr(processes, '_peers', Pretended(*others))
        monkeypatch.setattr(jax, 'process_count', lambda: 2)

    return pretend


def test_processes_that_differ_are_refused_before_they_part(two):
    kind = f'{jax.local_device_count()} {jax.devices()[0].device_kind}'
    two({'seed': 1, 'its devices': kind}, {'seed': 0, 'its devices': '1 H200'})
    message = (r'the processes differ in their config: seed is 0 in process 0 \(a\) but 1 in process 1 \(b\)'
               '; start all with')
    with pytest.raises(ValueError, match=message):
        processes.check_same({'seed': 0}, 'their config')
    with pytest.raises(ValueError, match=f'its devices is {kind} in process 0 .* but 1 H200 in process 1'):
        processes.check_same({'seed': 0}, 'their config')


def test_a_folder_that_another_process_does_not_share(two, tmp_path):
    two('', ['/home/b', True])
    processes.check_same_folder(tmp_path)
    two('', ['/home/b', False])
    message = rf'{tmp_path} of process 0 \(a\) is not the folder /home/b of process 1 \(b\); name one'
    with pytest.raises(ValueError, match=message):
        processes.check_same_folder(tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_error_of_a_connection_is_told_from_others(two, monkeypatch):
    monkeypatch.setattr(processes, 'LOSS_S', 0)
    two()
    error = processes.explain(ValueError('UNKNOWN: Gloo AllGather failed: Connection reset\nby peer'))
    assert error.exit_status == exit_status.PEER_LOST
    assert 'failed (UNKNOWN: Gloo AllGather failed: Connection reset); the same command' in str(error)
    other = ValueError('config.seed -1')
    assert processes.explain(other) is other


def test_a_checkpoint_that_one_of_several_cannot_write_ends_the_run(monkeypatch, tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path)

    def full(*args, **kwargs):
        raise OSError('No space left on device')

    monkeypatch.setattr(checkpoint.ocp.CheckpointManager, 'save', full)
    assert 'could not be written (No space left' in checkpoints.save(1, {}, {})
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    message = r'process 0 could not write its shards of step 1 \(No space left'
    with pytest.raises(OSError, match=message):
        checkpoints.save(1, {}, {})


def test_every_device_of_several_processes_must_be_in_the_mesh(monkeypatch):
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    with pytest.raises(ValueError, match=r'sequence 4 \* tensor 1 = 4 devices but the 2 processes have 8'):
        sharding.make_mesh((1, 1, 4, 1))


def chips(sides, slices=1):
    """A stand-in for the devices of TPU v4 slices: what the arrangement of a mesh looks at."""
    return [types.SimpleNamespace(platform='tpu', device_kind='TPU v4', coords=coords[::-1], core_on_chip=0,
                                  slice_index=s, process_index=0, id=i)
            for s in range(slices) for i, coords in enumerate(np.ndindex(*sides[::-1]))]


def test_a_ring_may_be_half_a_side_of_a_torus_but_is_whole_sides_where_it_can():
    devices = chips((4, 4, 4))
    whole = sharding._arranged((1, 4, 16, 1), devices)
    assert (whole == mesh_utils.create_device_mesh((1, 4, 16, 1), devices)).all()
    with pytest.raises(NotImplementedError):
        mesh_utils.create_device_mesh((1, 2, 32, 1), devices)
    split = sharding._arranged((1, 2, 32, 1), devices)
    assert split.shape == (1, 2, 32, 1) and len({d.coords for d in split.flat}) == 64


def test_the_first_axes_go_between_slices():
    mesh = sharding._arranged((2, 2, 16, 1), chips((4, 4, 1), slices=4))
    slices = [[len({d.slice_index for d in ring}) for ring in rings] for rings in mesh[..., 0]]
    assert slices == [[1, 1], [1, 1]]
    assert len({d.slice_index for d in mesh[:, :, 0, 0].flat}) == 4
    with pytest.raises(ValueError, match='does not divide over 3 TPU slices'):
        sharding._arranged((2, 2, 4, 1), chips((4, 4, 1), slices=3))


def test_the_templates_start_what_the_package_understands():
    jobset = yaml.safe_load((LAUNCHERS / 'jobset.yaml').read_text())
    [workers] = jobset['spec']['replicatedJobs']
    job = workers['template']['spec']
    [container] = job['template']['spec']['containers']
    variables = {one['name']: one.get('value', '0') for one in container['env']}
    place = clusters.find(variables)
    assert place.count == job['parallelism'] == job['completions'] and place.index == 0
    host = f'{jobset["metadata"]["name"]}-{workers["name"]}-0-0.{jobset["metadata"]["name"]}'
    assert place.address.split(':')[0] == host
    assert not any('mesh' in flag for flag in container['args'])  # the config's


@pytest.mark.parametrize('status, requeued', [(0, False), (1, False), (130, True), (76, True)])
def test_the_slurm_template_passes_its_flags_on_and_requeues(tmp_path, status, requeued):
    for name, text in (('srun', f'echo srun "$@"; case "$*" in *extend.py*) exit {status};; esac'),
                       ('scontrol', 'echo scontrol "$@"')):
        (tmp_path / name).write_text(f'#!/bin/bash\n{text}\n')
        (tmp_path / name).chmod(0o755)
    environment = {'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'SLURM_CPUS_PER_TASK': '12',
                   'SLURM_JOB_ID': '7'}
    done = subprocess.run(['bash', LAUNCHERS / 'slurm.sh', '--config', 'runs/8b.py', '--set', 'name=a b'],
                          env=environment, capture_output=True, text=True, timeout=60, check=False)
    lines = done.stdout.splitlines()
    assert done.returncode == status
    assert lines[0].endswith('python -u experiments/doctor.py')
    assert lines[1].endswith('python -u experiments/extend.py --config runs/8b.py --set name=a b')
    assert ('scontrol requeue 7' in lines) == requeued
