"""The folder of compiled programs: the user's own, free of damaged entries, and bounded."""

import os
import stat
import zlib

import pytest

from lct.cli import program_cache


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty cache folder, an environment that decides nothing, and a stand-in for jax."""
    for name in list(os.environ):
        if name.startswith(('JAX_COMPILATION', 'JAX_PERSISTENT', 'JAX_ENABLE_COMPILATION')):
            monkeypatch.delenv(name)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.delitem(program_cache.sys.modules, 'jax')
    monkeypatch.setattr(program_cache.os, 'environ', dict(os.environ))
    return tmp_path


def entry(folder, name, content=b'program', age_s=0.0):
    path = folder / f'{name}-cache'
    path.write_bytes(content)
    os.utime(path, (path.stat().st_mtime - age_s,) * 2)
    return path


def test_it_is_on_in_a_folder_that_only_the_user_can_read(home):
    folder = program_cache.enable()
    assert folder == home / 'lct' / 'compiled' / program_cache.cpu_kind()
    assert program_cache.os.environ['JAX_COMPILATION_CACHE_DIR'] == str(folder)
    assert stat.S_IMODE(folder.stat().st_mode) & 0o022 == 0
    folder.chmod(0o777)
    program_cache.os.environ.pop('JAX_COMPILATION_CACHE_DIR')
    assert program_cache.enable() is None


@pytest.mark.parametrize('name, value', [('JAX_COMPILATION_CACHE_DIR', '/elsewhere'),
                                         ('JAX_ENABLE_COMPILATION_CACHE', '0')])
def test_the_environment_decides(home, name, value):
    program_cache.os.environ[name] = value
    assert program_cache.enable() is None and not (home / 'lct').exists()


def test_the_first_process_alone_checks_the_entries(home):
    folder = program_cache.enable()
    cut = entry(folder, 'a', zlib.compress(b'program' * 100)[:20])
    process = {'JAX_COORDINATOR_ADDRESS': 'here:1', 'JAX_NUM_PROCESSES': '2'}
    for index, left in (('1', True), ('0', False)):
        program_cache.os.environ.pop('JAX_COMPILATION_CACHE_DIR')
        program_cache.os.environ.update(process, JAX_PROCESS_ID=index)
        assert program_cache.enable() == folder and cut.exists() == left


def test_another_cpu_has_another_folder(monkeypatch):
    here = program_cache.cpu_kind()
    monkeypatch.setattr(program_cache.Path, 'read_text', lambda path: 'model name : A\nflags : sse2\n')
    one = program_cache.cpu_kind()
    monkeypatch.setattr(program_cache.Path, 'read_text', lambda path: 'model name : A\nflags : sse2 avx2\n')
    assert len({here, one, program_cache.cpu_kind()}) == 3


def test_entries_that_were_cut_short_are_deleted(tmp_path):
    whole = zlib.compress(b'program' * 100)
    contents = {'a': whole, 'b': whole[:20], 'c': b''}
    good, cut, empty = (entry(tmp_path, name, content) for name, content in contents.items())
    program_cache.tidy(tmp_path)
    assert good.exists() and not cut.exists() and not empty.exists()
    entry(tmp_path, 'd', whole[:20], age_s=3600)  # as old as those that were checked: not read again
    program_cache.tidy(tmp_path)
    assert (tmp_path / 'd-cache').exists()


def test_the_oldest_entries_go_when_the_folder_is_full(tmp_path):
    program_cache.tidy(tmp_path)
    paths = [entry(tmp_path, str(i), bytes(100), age_s=100.0 - i) for i in range(6)]
    program_cache.tidy(tmp_path, max_bytes=600)
    assert all(path.exists() for path in paths)
    program_cache.tidy(tmp_path, max_bytes=500)
    assert [path.exists() for path in paths] == [False] * 4 + [True] * 2


def test_damaged_entries_are_no_part_of_a_full_folder(tmp_path):
    program_cache.tidy(tmp_path)
    entry(tmp_path, 'cut', zlib.compress(bytes(range(256)) * 9)[:200], age_s=-5.0)
    paths = [entry(tmp_path, str(i), bytes(100), age_s=-10.0 - i) for i in range(6)]
    program_cache.tidy(tmp_path, max_bytes=500)
    assert [path.exists() for path in paths] == [False] * 4 + [True] * 2
