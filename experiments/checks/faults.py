"""Faults inside drill_training.py: --fault NAME@PLACE[/PROCESS].

    hang-data@4        the loader never gives its fourth batch
    stall-data@4       the fourth batch cannot be read for three seconds
    lose-data@4        nothing can be read from the fourth batch on
    clock@4            the clock is set back by a day, and then far ahead, from the fourth batch on
    TERM@compile       a signal in a phase, in which native code keeps the main thread for seconds
    TERM,INT@save      two signals, a second apart

A signal in the phase data comes while the fourth batch is made, which then takes for ever.
"""

import ctypes
import os
import signal
import threading
import time

from lct import watchdog
from lct.data.batches.loader import Loader

BUSY_S, FIRST_S, BETWEEN_S, BATCH = 4.0, 0.5, 1.0, 4


def install(text: str, process: int) -> None:
    """Cause a fault in this process, unless it names another."""
    fault, _, index = text.partition('/')
    if not fault or (index and int(index) != process):
        return
    name, _, place = fault.partition('@')
    if name in DATA:
        at_batch(int(place), DATA[name])
    elif place == 'data':
        at_batch(BATCH, lambda age: hang_and_send(name))
    else:
        in_phase(place, name)


def at_batch(number, function):
    """Call function(seconds since its first call) before each batch from a number on is made."""
    make, count, first = Loader._make, [0], []

    def faulty(self):
        count[0] += 1
        if count[0] >= number:
            first.append(time.monotonic())
            function(time.monotonic() - first[0])
        return make(self)

    Loader._make = faulty


def hang_and_send(numbers):
    """Give no batch, and send signals once the main thread waits for it."""
    while watchdog.current().name != 'data':
        time.sleep(0.05)
    send(numbers)
    threading.Event().wait()


def in_phase(phase, numbers):
    """Signals at the first time that a phase is entered, and native code that no signal interrupts."""
    enter, done = watchdog.phase.__enter__, []

    def entered(self):
        enter(self)
        if self.name == phase and not done:
            done.append(True)
            send(numbers)
            block(BUSY_S)

    watchdog.phase.__enter__ = entered


def send(numbers):
    """Send this process signals by their names, 'TERM,INT', from a thread."""
    def run():
        for i, name in enumerate(numbers.split(',')):
            time.sleep(BETWEEN_S if i else FIRST_S)
            os.kill(os.getpid(), signal.Signals[f'SIG{name}'])

    threading.Thread(target=run, daemon=True).start()


def block(seconds):
    """Keep the calling thread in native code, which lets other threads run, as a compilation does."""
    library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    library.pthread_mutex_lock(mutex)
    threading.Timer(seconds, library.pthread_mutex_unlock, (mutex,)).start()
    library.pthread_mutex_lock(mutex)


def fail_for(seconds):
    def function(age):
        if age < seconds:
            raise OSError(116, 'Stale file handle')
    return function


def set_clock(age):
    now = time.clock_gettime(time.CLOCK_REALTIME)
    time.time = lambda: now + (-86400 if age < 0.1 else 1e7)


DATA = {
    'hang-data': lambda age: threading.Event().wait(), 'stall-data': fail_for(3),
    'lose-data': fail_for(1e9), 'clock': set_clock,
}
