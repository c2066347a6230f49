"""A block that no Ctrl-C can split: two assignments that belong together, or a donation and its result.

Python runs signal handlers between two instructions of the main thread. A handler that raises there, as the
one of Ctrl-C does, may lose the result of a call whose inputs are already gone.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGALRM)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Signals that arrive within the block are handled after it. In other threads, where Python runs no
    handlers, nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived = []
    handlers = {number: handler for number in SIGNALS if callable(handler := signal.getsignal(number))}
    try:
        for number in handlers:
            signal.signal(number, lambda *signal_and_frame: arrived.append(signal_and_frame))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number, frame in arrived:
            handlers[number](number, frame)
