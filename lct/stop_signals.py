"""Signals that ask a run to end: SIGINT, SIGTERM, SIGUSR1 and SIGHUP.

A terminal, a scheduler that needs the nodes, a warning before the time limit, a closed terminal: the first is
a request, the second ends the process at once. Python runs signal handlers between two instructions of the
main thread, so not in a compilation or a read that does not return. Therefore a thread, which gets the
numbers of all signals through a pipe, counts them as well.
"""

import contextlib
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

from lct import exit_status, watchdog
from lct.terminal import write_now

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
# One event may send a signal twice: srun and the scheduler, or a shell and the kernel for a closed terminal.
SAME_EVENT_S = {signal.SIGHUP: 3.0}
SAME_EVENT_DEFAULT_S = 0.1
REACTION_S = 5.0  # for the main thread, to leave native code after the first signal


@contextlib.contextmanager
def catch(request: Callable[[str], None], interrupt: bool = False) -> Iterator[None]:
    """Call request with the name of the first signal; a second one ends the process with STOPPED.

    request may be called in any thread. interrupt: raise KeyboardInterrupt in the main thread besides, and
    end the process if that does not happen within REACTION_S. A SIGHUP that is ignored (nohup) stays ignored.
    Outside the main thread, where Python takes no handlers, nothing is caught.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    receiver = _Receiver(request, interrupt)
    ignored = [number for number in (signal.SIGHUP, signal.SIGTSTP)
               if signal.getsignal(number) == signal.SIG_IGN]
    previous = {number: signal.signal(number, receiver.handle)
                for number in (*SIGNALS, signal.SIGTSTP) if number not in ignored}
    old_pipe = signal.set_wakeup_fd(receiver.pipe, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(old_pipe)
        for number, handler in previous.items():
            signal.signal(number, handler)
        receiver.close()


class _Receiver:
    """Counts signals twice: in the main thread's handlers and in a thread. Whichever comes first acts."""

    def __init__(self, request, interrupt):
        self._request, self._interrupt = request, interrupt
        self._first, self._handled, self._read = itertools.count(), [], []
        self._closed = False
        numbers, self.pipe = os.pipe()
        os.set_blocking(self.pipe, False)
        threading.Thread(target=self._run, args=(numbers,), name='lct-signals', daemon=True).start()

    def close(self):
        self._closed = True
        os.close(self.pipe)

    def handle(self, number, _frame):
        if number == signal.SIGTSTP:
            return  # the thread stops the process
        new = self._count(self._handled, number)
        if new and self._interrupt:
            raise KeyboardInterrupt

    def _run(self, numbers):
        while read := os.read(numbers, 64):
            for number in read:
                if number == signal.SIGTSTP:
                    watchdog.stop_process()
                elif number in SIGNALS and self._count(self._read, number) and self._interrupt:
                    timer = threading.Timer(REACTION_S, self._end, (number,))
                    timer.daemon = True
                    timer.start()
        os.close(numbers)

    def _count(self, times, number):
        """Add a signal to its list [(number, time)]. Returns whether it is not an echo of the one before."""
        now = time.monotonic()
        echo = times and times[-1][0] == number and (
            now - times[-1][1] < SAME_EVENT_S.get(number, SAME_EVENT_DEFAULT_S))
        if echo:
            return False
        times.append((number, now))
        if len(times) > 1:
            self._end(number)
        if next(self._first) == 0:
            self._request(signal.Signals(number).name)
        return True

    def _end(self, number):
        if self._closed:
            return
        phase = watchdog.current()
        place = f' in phase {phase}' if phase else ''
        write_now(f'{signal.Signals(number).name}: stopped at once{place}; the same command continues from '
                  'the last checkpoint\n')
        os._exit(exit_status.STOPPED)
