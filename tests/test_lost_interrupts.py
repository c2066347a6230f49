import gc
import signal
import sys
import time

import pytest

from lct import lost_interrupts


@pytest.fixture
def ignored(monkeypatch):
    """The exceptions that reached the hook of before, in a process that Ctrl-C interrupts."""
    found = []
    monkeypatch.setattr(sys, 'unraisablehook', lambda unraisable: found.append(unraisable.exc_type))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with lost_interrupts.resent():
        yield found
    signal.signal(signal.SIGINT, before)


def collect_with(action):
    """A garbage collection with a callback that acts once, as the one of jax."""
    def callback(phase, info):
        gc.callbacks.remove(callback)
        action()

    gc.callbacks.append(callback)
    gc.collect()


def test_an_interrupt_in_the_garbage_collection_comes_after_it(ignored):
    with pytest.raises(KeyboardInterrupt):
        collect_with(lambda: signal.raise_signal(signal.SIGINT))
        time.sleep(5)
    assert not ignored


def test_other_ignored_exceptions_are_reported_as_before(ignored):
    collect_with(lambda: 1 / 0)
    assert ignored == [ZeroDivisionError]
