"""Ctrl-C where Python ignores exceptions: in callbacks of the garbage collector, of which jax has one, in
finalizers and in weak references."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator

DELAY_S = 0.01  # the code that ignores exceptions has usually ended by then; if not, the next one follows


@contextlib.contextmanager
def resent() -> Iterator[None]:
    """Within the block an ignored KeyboardInterrupt comes to the main thread once more."""
    previous = sys.unraisablehook

    def hook(unraisable):
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            previous(unraisable)
            return
        main = threading.main_thread().ident
        timer = threading.Timer(DELAY_S, signal.pthread_kill, (main, signal.SIGINT))
        timer.daemon = True
        timer.start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        if sys.unraisablehook is hook:  # another module may have put its own around it
            sys.unraisablehook = previous
