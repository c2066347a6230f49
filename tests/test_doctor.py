"""The doctor finds what is broken and names the remedy, and its exit status is the verdict."""

import importlib.metadata
import pathlib
import sys

import doctor
import jax
import pytest

from lct.cli.main import run_script

EXPERIMENTS = pathlib.Path(__file__).parents[1] / 'experiments'


@pytest.fixture
def examine(monkeypatch, tmp_path, capsys):
    """Runs the doctor with only the named checks; returns its exit status and output."""
    def run(*names):
        for name in ('versions', 'flags', 'neighbours', 'devices', 'links', 'disk', 'training'):
            if names and name not in names:
                fine = lambda warn, *_: 'not checked'
                fine.__name__ = name
                monkeypatch.setattr(doctor, name, fine)
        monkeypatch.setattr(sys, 'argv', ['doctor.py', '--workdir', str(tmp_path / 'runs')])
        status = 0
        try:
            run_script(doctor.run)
        except SystemExit as stop:
            status = stop.code
        out = capsys.readouterr().out
        assert ('this machine can train' in out) == (status == 0)
        return status, out

    return run


def test_a_healthy_machine(examine, tmp_path, monkeypatch):
    assert jax.device_count() == 8  # from here on jax does not read
    monkeypatch.setenv('XLA_FLAGS', '')  # whose check starts a process
    status, out = examine()
    assert status == 0 and 'FAIL' not in out, out
    for line in ('ok    versions', 'ok    devices    8 x cpu', 'ok    links      a ring of 8 rotates',
                 'ok    disk',
                 'ok    training   two steps on 2x1x4x1'):
        assert line in out
    assert 'JAX_DISABLE_MOST_OPTIMIZATIONS=1 slows everything down' in out  # as these tests do
    assert list((tmp_path / 'runs').iterdir()) == []


def test_an_unknown_flag_is_named(examine, monkeypatch):
    monkeypatch.setenv('XLA_FLAGS', '--xla_gpu_go_faster=true')
    status, out = examine('flags')
    assert status == 1
    assert 'FAIL  flags      XLA_FLAGS: unknown --xla_gpu_go_faster=true; take that out' in out


def test_a_package_that_is_too_old_or_beside_another_jax(examine, monkeypatch):
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, 'version', lambda name: '0.1' if name == 'optax' else real(name))
    assert 'optax 0.1 is not >=0.2.8; run pip install "optax>=0.2.8"' in examine('versions')[1]
    monkeypatch.setattr(importlib.metadata, 'version', lambda name: '0.5' if name == 'jaxlib' else real(name))
    status, out = examine('versions')
    assert status == 1 and 'FAIL  versions   jaxlib 0.5 beside jax' in out


def test_accelerators_that_jax_does_not_find(examine, monkeypatch):
    monkeypatch.setattr(doctor.glob, 'glob', lambda pattern: ['/dev/nvidia0'] if 'nvidia' in pattern else [])
    monkeypatch.delenv('JAX_PLATFORMS')
    status, out = examine('devices')
    assert status == 1 and 'jax computes on its CPU; run pip install "jax[cuda13]"' in out
    monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
    status, out = examine('devices')
    assert status == 0 and 'warn  devices    JAX_PLATFORMS=cpu hides' in out


def test_a_full_disk_and_one_that_cannot_be_written(examine, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.shutil, 'disk_usage',
                        lambda path: doctor.shutil._ntuple_diskusage(10, 9, 10**8))
    status, out = examine('disk')
    assert status == 1 and 'has 0.10 GB free; free some' in out
    (tmp_path / 'runs').rmdir()
    (tmp_path / 'runs').write_text('a file')
    status, out = examine('disk')
    assert status == 1 and 'cannot be written' in out


def test_links_that_corrupt_data(examine, monkeypatch):
    monkeypatch.setattr(jax.lax, 'ppermute', lambda x, axis, pairs: x)
    status, out = examine('links')
    assert status == 1 and 'the links of this machine corrupt data' in out
