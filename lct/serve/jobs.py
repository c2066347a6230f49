"""Queries that wait for the model, and the thread that answers them one after another.

The thread alone touches the model and its caches; everything else talks to it through jobs. A job that is
cancelled ends at the next token or prefill chunk.
"""

import contextlib
import queue
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Protocol

from lct.serve.errors import ApiError
from lct.serve.requests import Query
from lct.serve.responses import End, Text

IDLE_S = 0.2  # without a query, before texts are saved
Event = Text | End | ApiError


def stopping() -> ApiError:
    return ApiError(503, 'the server is stopping; try again later')


class Cancelled(Exception):
    """The client of a job has gone; raised where its computation may end."""


class Job:
    """A Query on its way through the queue.

    deliver: called in the model's thread with every event; the last one is an End or an ApiError.
    state: 'queued', 'reading', 'answering' or 'done'. read, reused, prompt: tokens of the prompt that are in
    the cache by now, those that were there before, and all of them. answered: tokens of the answer.
    """

    def __init__(self, query: Query, deliver: Callable[[Event], None]):
        self.query, self.deliver = query, deliver
        self.state = 'queued'
        self.prompt = self.reused = self.read = self.answered = 0
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        self._cancelled.set()

    def check(self) -> None:
        """Raise Cancelled if the client has gone."""
        if self._cancelled.is_set():
            raise Cancelled


class Answerer(Protocol):
    """What the thread runs, always in itself."""

    def answer(self, job: Job) -> Iterator[Event]:
        """The events of a job; Cancelled, ApiError or another exception may end them."""

    def idle(self) -> bool:
        """Called while nothing waits. Returns whether there is more to do."""

    def close(self) -> None:
        """Called at the end."""


class ModelThread:
    """Answers jobs in the order of their arrival.

    context: makes the context of the mesh, in the thread. max_waiting: jobs that may wait.
    """

    def __init__(self, answerer: Answerer, context: Callable[[], contextlib.AbstractContextManager],
                 max_waiting: int):
        self._answerer, self._context, self.max_waiting = answerer, context, max_waiting
        self._queue, self._lock, self._stopping = queue.Queue(), threading.Lock(), False
        self.current: Job | None = None
        self._thread = threading.Thread(target=self._run, name='lct-model', daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def waiting(self) -> int:
        return self._queue.qsize()

    def submit(self, job: Job) -> None:
        """Queue a job. Raises ApiError if too many wait, or if the thread has ended."""
        with self._lock:
            if self._stopping or not self._thread.is_alive():
                raise stopping()
            if self.waiting >= self.max_waiting:
                raise ApiError(429, f'{self.max_waiting} requests wait already; try again later', None,
                               'rate_limit_exceeded')
            self._queue.put(job)

    def stop(self, timeout: float | None = None) -> None:
        """End the current job, refuse those that wait, and end the thread."""
        with self._lock:
            self._stopping = True
        if (current := self.current) is not None:
            current.cancel()
        self._queue.put(None)  # wakes the thread
        self._thread.join(timeout)

    def _run(self):
        with self._context():
            busy = True
            while not self._stopping:
                try:
                    job = self._queue.get(timeout=IDLE_S)
                except queue.Empty:
                    busy = busy and self._guarded(self._answerer.idle)
                    continue
                if job is not None:
                    self._answer(job)
                    busy = True
            while not self._queue.empty():
                if (job := self._queue.get()) is not None:
                    job.deliver(stopping())
            self._guarded(self._answerer.close)

    def _answer(self, job):
        self.current = job
        try:
            job.check()
            for event in self._answerer.answer(job):
                job.deliver(event)
        except Cancelled:
            job.deliver(ApiError(503, 'the request was cancelled'))
        except ApiError as error:
            job.deliver(error)
        except Exception as error:
            traceback.print_exc()
            job.deliver(ApiError(500, f'{type(error).__name__} in the server; its log shows where'))
        finally:
            job.state, self.current = 'done', None

    def _guarded(self, function):
        """A failure of what nobody waits for is logged, and done with."""
        try:
            return function()
        except Exception as error:
            print(f'WARNING: {type(error).__name__}: {error}', file=sys.stderr, flush=True)
            return False
