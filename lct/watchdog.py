"""A budget in seconds for each phase of a run, so that a hang ends the process and not the allocation.

A collective whose peer is gone, a read of a file system that does not answer and a deadlock look alike:
nothing happens, for ever. The main thread marks its phases (with phase('step', 12): ...); a thread of its own
compares their age with a budget once a second. A phase that is too old ends the process with
exit_status.STUCK, after a line on stderr and a dump of all stacks into the work directory. Nothing is saved
then: the last checkpoint stands.

Ages are those of time.monotonic, which neither a set clock nor a suspended machine moves. The time in which
the whole process was stopped (SIGSTOP) is not counted either. If native code holds the interpreter, so that
not even the thread runs, lct.last_resort ends the process after twice the budget.
"""

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

from lct import exit_status
from lct.last_resort import LastResort
from lct.terminal import write_now

# Seconds. In several processes a step also waits for the data of the others, so its budget is the larger.
BUDGETS = {'set_up': 7200.0, 'compile': 3600.0, 'step': 1800.0, 'evaluation': 3600.0, 'data': 1200.0,
           'save': 7200.0}
TICK_S = 1.0
STOPPED_S = 5.0  # a tick that comes so late was not running, or not scheduled
REPORT_S = 10.0  # for the report, which may hang in the same file system
LINGER_S = 3.0  # for the reports of the other processes, which would end when they miss this one

_watch = None
tell_others = None  # set by lct.processes: callable (status, reason) that names this process to the others


def budgets_of(changes: Mapping[str, float | None]) -> dict[str, float]:
    """BUDGETS with changes; 0 or None is a phase without a limit.

    Raises:
      ValueError: for an unknown phase, or a budget that is not a number from 0 on.
    """
    for name, seconds in changes.items():
        if name not in BUDGETS:
            raise ValueError(f'watchdog.{name} is not a phase; give seconds for {", ".join(BUDGETS)}')
        if not isinstance(seconds, (int, float, type(None))) or not (seconds or 0) >= 0:
            raise ValueError(f'watchdog.{name} {seconds!r} must be a number of seconds, or 0 for no limit')
    return {name: float(seconds or 0) for name, seconds in {**BUDGETS, **changes}.items()}


@contextlib.contextmanager
def watch(changes: Mapping[str, float | None], folder: str | os.PathLike, process: int = 0) -> Iterator[None]:
    """Keep the budgets of the phases that the calling thread enters; outside of all others it is in 'set_up'.

    changes: see budgets_of. folder: where stacks_PROCESS.txt is written, once it exists.
    """
    global _watch
    outer, _watch = _watch, _Watch(budgets_of(changes), Path(folder) / f'stacks_{process}.txt', process)
    try:
        with phase('set_up'):
            yield
    finally:
        _watch.close()
        _watch = outer


class phase:  # noqa: N801  reads as the verb that it is
    """A context manager: the thread of watch() is in a phase of the run, at a step of it if given.

    The innermost phase counts, and its end starts the clock of the one around it again. Without watch(), and
    in other threads, it does nothing.
    """

    __slots__ = ('name', 'step', 'began', '_entered')

    def __init__(self, name: str, step: int | None = None):
        self.name, self.step, self.began, self._entered = name, step, 0.0, None

    def __enter__(self) -> None:
        if _watch is not None and threading.get_ident() == _watch.thread:
            self._entered = _watch.phases
            self.began = time.monotonic()
            self._entered.append(self)
            _watch.shorten(self)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 tb: TracebackType | None) -> None:
        if self._entered is not None:
            self._entered.pop()
            self._entered = None
            beat()

    def __str__(self) -> str:
        return self.name.replace('_', '-') + ('' if self.step is None else f' {self.step}')


def beat() -> None:
    """A sign of progress: the clock of the current phase starts again."""
    if _watch is not None and _watch.phases:
        _watch.phases[-1].began = time.monotonic()


def current() -> phase | None:
    """The innermost phase of the watched thread."""
    phases = _watch.phases if _watch is not None else ()
    return phases[-1] if phases else None


def stop_process() -> None:
    """SIGSTOP for this process, until SIGCONT, as Ctrl-Z asks; the time does not count."""
    if _watch is not None:
        _watch.suspend()
    os.kill(os.getpid(), signal.SIGSTOP)


class _Watch:
    """The thread that compares ages with budgets.

    thread: of the phases, by its identifier. phases: innermost last; the thread of the phases alone changes
    it.
    """

    def __init__(self, budgets, path, process):
        self.thread, self.phases = threading.get_ident(), []
        self._budgets, self._path, self._process = budgets, path, process
        limits = [seconds for seconds in budgets.values() if seconds]
        self._interval = min([TICK_S, *(seconds / 4 for seconds in limits)])
        self._last = time.monotonic()
        self._file, self._armed_until = None, float('inf')
        self._last_resort = LastResort(
            f'stuck: process {process} is held by native code for longer than the budget of its phase; '
            f'stacks are in {path}; the same command continues from the last checkpoint')
        self._open()
        self._closed = threading.Event()
        self._ticker = threading.Thread(target=self._run, name='lct-watchdog', daemon=True)
        self._ticker.start()

    def close(self):
        self._closed.set()
        self._ticker.join(REPORT_S)
        self._last_resort.close()
        if self._file is not None:
            self._file.close()
            with contextlib.suppress(OSError):
                if not self._path.stat().st_size:
                    self._path.unlink()

    def suspend(self):
        """Nothing ends the process before the next tick."""
        self._armed_until = float('inf')
        self._last_resort.disarm()

    def shorten(self, entered):
        """Arm the last resort for a phase that must end before it would act; all else is left to the tick."""
        budget = self._budgets[entered.name]
        if budget and entered.began + 2 * budget + TICK_S < self._armed_until:
            self._arm(entered.began, budget, budget)

    def _arm(self, now, left, budget):
        seconds = max(left, 0) + max(budget, TICK_S)
        self._armed_until = now + seconds
        self._last_resort.arm(seconds)

    def _run(self):
        while not self._closed.wait(self._interval):
            self.tick()

    def tick(self):
        """Compare the age of the current phase with its budget."""
        now, phases = time.monotonic(), self.phases[-1:]
        late, self._last = now - self._last, now
        if late > self._interval + STOPPED_S:
            for stopped in phases:
                stopped.began += late
        self._open()
        self._check(phases, now)

    def _check(self, phases, now):
        budget = self._budgets[phases[0].name] if phases else 0
        if not budget:
            self.suspend()
            return
        began = phases[0].began
        left = budget - (now - began)
        self._arm(now, left, budget)
        if left < 0 and self.phases[-1:] == phases and phases[0].began == began:
            report = threading.Thread(target=self._report, args=(phases[0], now - began, budget), daemon=True)
            report.start()
            report.join(REPORT_S)
            time.sleep(LINGER_S)
            os._exit(exit_status.STUCK)

    def _open(self):
        """Open the file of the stacks once there is a folder; at the time of a hang, that may hang too."""
        if self._file is None and self._path.parent.is_dir():
            with contextlib.suppress(OSError):
                self._file = self._path.open('a')
                self._last_resort.dump_to(self._file)

    def _report(self, late, age, budget):
        stacks = 'are not written'
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.write(f'{time.strftime("%Y-%m-%d %H:%M:%S")} phase {late}: {age:.1f} s\n')
                self._file.flush()
                faulthandler.dump_traceback(self._file, all_threads=True)
                stacks = f'are in {self._path}'
        write_now(
            f'stuck: process {self._process}, phase {late}: {age:,.1f} s, more than its budget of {budget:,g}'
            f' s (watchdog.{late.name}; 0 is no limit); stacks {stacks}; the same command continues from the '
            f'last checkpoint\nstuck: the main thread is in {self._place()}\n')
        if tell_others is not None:
            tell_others(exit_status.STUCK, f'stuck for {age:,.0f} s in phase {late}')

    def _place(self, most=4):
        """The innermost frames of the watched thread, innermost first."""
        frame = sys._current_frames().get(self.thread)
        frames = traceback.extract_stack(frame)[::-1][:most] if frame else []
        return ' < '.join(f'{os.path.basename(f.filename)}:{f.lineno} {f.name}' for f in frames)
