"""The watchdog, signals and closed terminals, in processes that import no jax."""

import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import types

import pytest

from lct import exit_status, terminal, watchdog

ROOT = pathlib.Path(__file__).parents[1]
# Seconds of native code that no signal interrupts and that lets other threads run, as a compilation does.
NATIVE = 'hashlib.pbkdf2_hmac("sha256", b"", b"", 20_000_000)'
WATCHED = '''
import ctypes, hashlib, os, signal, sys, threading, time
from lct import stop_signals, watchdog
watchdog.LINGER_S = 0
with watchdog.watch({budgets}, sys.argv[1]):
    {code}
print('ended')
'''


def start(code):
    return subprocess.Popen([sys.executable, '-c', code, '.'], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env={**os.environ, 'PYTHONPATH': str(ROOT)})


def run(code, folder='.', **budgets):
    began = time.monotonic()
    done = subprocess.run([sys.executable, '-c', WATCHED.format(budgets=budgets, code=code), str(folder)],
                          capture_output=True, text=True, timeout=60,
                          env={**os.environ, 'PYTHONPATH': str(ROOT)})
    return done.returncode, done.stdout, done.stderr.splitlines(), time.monotonic() - began


def test_a_phase_over_its_budget_ends_the_process_and_shows_where_it_stands(tmp_path):
    status, _, lines, _ = run('with watchdog.phase("step", 12): threading.Event().wait()', tmp_path, step=0.4)
    assert status == exit_status.STUCK and len(lines) == 2
    assert 'process 0, phase step 12: 0.' in lines[0] and 'budget of 0.4 s (watchdog.step' in lines[0]
    assert f'stacks are in {tmp_path}/stacks_0.txt; the same command continues' in lines[0]
    assert 'the main thread is in ' in lines[1] and '<string>:' in lines[1]
    stacks = (tmp_path / 'stacks_0.txt').read_text()
    assert 'phase step 12' in stacks and 'File "<string>"' in stacks


@pytest.mark.skipif(sys.platform != 'linux', reason='timers of the C library')
def test_native_code_that_holds_the_interpreter_is_ended_too(tmp_path):
    hang = 'mutex, lock = ctypes.create_string_buffer(64), ctypes.PyDLL(None).pthread_mutex_lock\n' \
           '    with watchdog.phase("save"): lock(mutex), lock(mutex)'
    status, _, lines, seconds = run(hang, tmp_path, save=0.4)
    assert status == exit_status.STUCK and seconds < 20
    assert len(lines) == 1 and 'process 0 is held by native code for longer' in lines[0]
    assert 'File "<string>"' in (tmp_path / 'stacks_0.txt').read_text()


def test_a_folder_that_cannot_be_written_and_a_full_stderr_do_not_keep_the_process():
    block = 'os.set_blocking(2, False)\n    try:\n        while os.write(2, b"x" * 4096): pass\n' \
            '    except BlockingIOError: os.set_blocking(2, True)\n'
    process = start(WATCHED.format(budgets={'step': 0.3}, code=block + '    with watchdog.phase("step"): '
                                   'time.sleep(60)').replace('sys.argv[1]', '"/none"'))
    assert process.wait(20) == exit_status.STUCK
    process.communicate()


@pytest.fixture
def clock(monkeypatch, tmp_path):
    """A watched thread with budgets step=100 and data without a limit. clock(seconds) passes time and gives
    the statuses with which the process would have ended."""
    ended, now = [], [0.0]
    monkeypatch.setattr(watchdog, 'LastResort', lambda message: types.SimpleNamespace(
        **dict.fromkeys(('arm', 'disarm', 'dump_to', 'close'), lambda *_: None)))
    monkeypatch.setattr(watchdog, 'TICK_S', 1e9)
    monkeypatch.setattr(watchdog, 'LINGER_S', 0)
    monkeypatch.setattr(watchdog.time, 'monotonic', lambda: now[0])
    monkeypatch.setattr(watchdog.os, '_exit', ended.append)

    def passes(seconds, ticks=20):
        for _ in range(ticks):
            now[0] += seconds / ticks
            watchdog._watch.tick()
        return ended

    with watchdog.watch({'set_up': 100, 'step': 100, 'data': 0, 'compile': 1000}, tmp_path, 3):
        yield passes


def test_each_phase_has_its_own_time(clock, capfd):
    for step in range(5):
        with watchdog.phase('step', step):
            assert clock(60) == []
        assert clock(20) == []  # between two phases
    with watchdog.phase('step'):
        for _ in range(3):
            assert clock(90) == []
            watchdog.beat()
        with watchdog.phase('compile', 7):
            assert clock(900) == [] and str(watchdog.current()) == 'compile 7'
        assert clock(90) == []  # again from its beginning
        with watchdog.phase('data'):
            assert clock(1e6) == []
        assert capfd.readouterr().err == '' and clock(110)[:1] == [exit_status.STUCK]
    first = capfd.readouterr().err.splitlines()[0]
    assert 'stuck: process 3, phase step: 10' in first and 'stacks_3.txt; the same command' in first


def test_a_stopped_process_and_another_thread_do_not_count(clock):
    with watchdog.phase('step'):
        assert clock(5000, ticks=1) == []  # SIGSTOP, then SIGCONT
        assert clock(90) == []
        other = threading.Thread(target=lambda: watchdog.phase('data').__enter__())
        other.start()
        other.join()
        assert watchdog.current().name == 'step'
    assert watchdog.current().name == 'set_up'


def test_nothing_remains_and_nothing_is_watched_outside(tmp_path):
    with watchdog.watch({}, tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == ['stacks_0.txt']
    assert not list(tmp_path.iterdir()) and watchdog.current() is None
    with watchdog.phase('step'):
        assert watchdog.current() is None


def test_budgets_are_checked_and_merged():
    assert watchdog.budgets_of({'step': 5, 'data': None}) == {
        **watchdog.BUDGETS, 'step': 5.0, 'data': 0.0}
    for name, value, message in (('stp', 1, 'stp is not a phase; give seconds for set_up, compile'),
                                 ('step', -1, 'step -1 must be a number of seconds'),
                                 ('step', 'long', "step 'long' must be"), ('step', float('nan'), 'must be')):
        with pytest.raises(ValueError, match=message):
            watchdog.budgets_of({name: value})


SIGNALLED = '''
import hashlib, os, signal, sys, time
from lct import stop_signals
got = []
def request(name):
    got.append(name)
    os.write(1, f'{{name}} '.encode())
with stop_signals.catch(request, interrupt=len(sys.argv) > 2):
    print('ready', flush=True)
    {code}
print(got)
'''


def signalled(code, *numbers, pause=0.3):
    """(status, output, seconds after the last signal) of a process that gets signals."""
    process = start(SIGNALLED.format(code=code))
    assert process.stdout.readline() == 'ready\n'
    for number in numbers:
        time.sleep(pause)
        process.send_signal(number)
    began = time.monotonic()
    out, err = process.communicate(timeout=60)
    return process.returncode, out + err, time.monotonic() - began


@pytest.mark.parametrize('code, numbers', [
    (NATIVE, (signal.SIGTERM, signal.SIGTERM)),
    ('open(os.pipe()[0]).read()', (signal.SIGUSR1, signal.SIGINT))])
def test_a_second_signal_ends_the_process_at_once(code, numbers):
    status, out, seconds = signalled(code, *numbers)
    name = signal.Signals(numbers[1]).name
    assert status == exit_status.STOPPED and seconds < 5
    assert f'{name}: stopped at once; the same command continues' in out and 'Traceback' not in out


def test_a_closed_terminal_may_say_so_twice_and_nohup_is_respected():
    wait = 'while not got: time.sleep(0.01)\n    time.sleep(0.5)'
    assert signalled(wait, signal.SIGHUP, signal.SIGHUP, pause=0.2)[:2] == (0, "SIGHUP ['SIGHUP']\n")
    code = SIGNALLED.format(code='os.kill(os.getpid(), 1)').replace(
        'got = []', 'got = []; signal.signal(signal.SIGHUP, signal.SIG_IGN)')
    assert start(code).communicate(timeout=20)[0] == 'ready\n[]\n'


def test_a_request_arrives_while_the_main_thread_is_in_native_code():
    native = NATIVE.replace('20_', '4_')  # seconds: longer than the signal takes to be sent
    status, out, _ = signalled(f'{native}; os.write(1, b"native ")', signal.SIGUSR1)
    assert (status, out) == (0, "SIGUSR1 native ['SIGUSR1']\n")


def test_output_to_a_closed_pipe_or_a_full_disk_ends_nothing(tmp_path):
    code = 'from lct import terminal; import sys\n' \
           'for i in range(3): terminal.write_line("x" * 10000)\n' \
           'terminal.write_line("on", sys.stderr); terminal.flush()'
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    process = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, env=environment)
    process.stdout.close()
    assert process.stderr.read() == 'on\n' and process.wait(20) == 0
    process.stderr.close()
    if os.path.exists('/dev/full'):
        with open('/dev/full', 'w') as full:
            done = subprocess.run([sys.executable, '-c', code], stdout=full, stderr=subprocess.PIPE,
                                  text=True, env=environment)
        assert (done.returncode, done.stderr) == (0, 'on\n')


def test_write_now_does_not_wait(capfd):
    terminal.write_now('line\n')
    assert capfd.readouterr().err == 'line\n'
