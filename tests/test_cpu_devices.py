import os

from lct import cpu_devices


def test_devices_wait_for_each_other_longer_than_by_default(monkeypatch):
    monkeypatch.setenv('XLA_FLAGS', f'--{cpu_devices.COUNT_FLAG}=8')
    cpu_devices.provide(2)
    assert os.environ['XLA_FLAGS'] == f'--{cpu_devices.COUNT_FLAG}=8 {cpu_devices.PATIENCE}=1000000000'


def test_a_time_that_the_user_gives_is_kept(monkeypatch):
    given = f'{cpu_devices.PATIENCE}=60 --{cpu_devices.COUNT_FLAG}=8'
    monkeypatch.setenv('XLA_FLAGS', given)
    cpu_devices.provide(2)
    assert os.environ['XLA_FLAGS'] == given
