"""Timers that end the process without the interpreter, for native code that holds it and does not return.

No Python runs then: not a thread, not a signal handler. The C library's timers (timer_create, Linux) call
functions of the C library: the handler that faulthandler has installed for DUMP writes the stacks of all
threads, warnx prints one line, _exit ends the process. Elsewhere faulthandler ends it, with status 1.
"""

import ctypes
import faulthandler
import signal
import sys
from typing import IO

from lct import exit_status

SECONDS_BETWEEN = 1.0  # dump, line, end
CLOCK_MONOTONIC, SIGEV_SIGNAL, SIGEV_THREAD = 1, 0, 2  # of Linux


class _Value(ctypes.Union):
    _fields_ = (('number', ctypes.c_int), ('pointer', ctypes.c_void_p))


class _Event(ctypes.Structure):
    """struct sigevent of Linux, 64 bytes."""
    _fields_ = (('value', _Value), ('signal', ctypes.c_int), ('notify', ctypes.c_int),
                ('function', ctypes.c_void_p), ('attributes', ctypes.c_void_p),
                ('padding', ctypes.c_char * 32))


class _Times(ctypes.Structure):
    """struct itimerspec: interval and value, each in seconds and nanoseconds."""
    _fields_ = (('interval', ctypes.c_long * 2), ('value', ctypes.c_long * 2))


class LastResort:
    """Ends the process with exit_status.STUCK when it is armed and not armed again in time.

    message: printed then; text that needs no formatting.
    """

    def __init__(self, message: str):
        self._message = ctypes.create_string_buffer(message.replace('%', '%%').encode())
        self._timers, self._file = None, None
        if sys.platform == 'linux':
            self._library = ctypes.CDLL(None, use_errno=True)
            self._dump = signal.SIGRTMAX - 5
            self._timers = [
                _Event(_Value(0), self._dump, SIGEV_SIGNAL),
                self._call('warnx', _Value(pointer=ctypes.addressof(self._message))),
                self._call('_exit', _Value(number=exit_status.STUCK))]
            self._timers = [self._create(event) for event in self._timers]

    def _call(self, name, value):
        function = ctypes.cast(getattr(self._library, name), ctypes.c_void_p).value
        return _Event(value, 0, SIGEV_THREAD, function)

    def _create(self, event):
        timer = ctypes.c_void_p()
        if self._library.timer_create(CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(timer)):
            raise OSError(ctypes.get_errno(), 'timer_create')
        return timer

    def dump_to(self, file: IO) -> None:
        """Write the stacks to an open file, which must stay open until close."""
        self._file = file
        if self._timers:
            faulthandler.register(self._dump, file, all_threads=True)

    def arm(self, seconds: float) -> None:
        """End the process in so many seconds, unless this is called again before."""
        if self._timers is None:
            faulthandler.dump_traceback_later(seconds, exit=True, file=self._file or sys.stderr)
            return
        first = 0 if self._file else 1  # DUMP without a handler would kill the process
        for i, timer in list(enumerate(self._timers))[first:]:
            self._set(timer, max(seconds, 0.001) + i * SECONDS_BETWEEN)

    def disarm(self) -> None:
        """Do nothing until arm is called."""
        if self._timers is None:
            faulthandler.cancel_dump_traceback_later()
        for timer in self._timers or ():
            self._set(timer, 0)

    def close(self) -> None:
        """Disarm for good."""
        self.disarm()
        for timer in self._timers or ():
            self._library.timer_delete(timer)
        if self._timers and self._file:
            faulthandler.unregister(self._dump)
        self._timers = [] if self._timers else None

    def _set(self, timer, seconds):
        times = _Times((0, 0), (int(seconds), int(seconds % 1 * 1e9)))
        self._library.timer_settime(timer, 0, ctypes.byref(times), None)
