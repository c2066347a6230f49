"""The processes of a run watch each other over TCP connections of their own, one from each to process 0.

They meet at the coordinator's address before jax uses it, so that who is missing, what differs between them
and a port in use are reported in a sentence. Afterwards each sends a beat every few seconds: whoever ends or
falls silent is named by all others, long before jax gives up with a stack trace. jax offers none of this in
public. Messages are JSON, one a line, between hosts of one run; nothing in them is executed.
"""

import contextlib
import json
import math
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from lct import exit_status
from lct.terminal import write_line, write_now

BEAT_S = 2.0
PATIENCE_S = 1.0  # for a process to report an error of its own, which others have met too
STOPPED_S = 10.0
STOPPING_S = 60.0  # for all to save and stop after one has
CLOSING_S = 10.0  # process 0 waits for the others to end first: jax aborts those that lose it
AGREE_S = 1800.0  # to reach a point where all agree; loading a model may take minutes on one host only
NOTICE_S = (10.0, 30.0)  # seconds until the first and between later lines about who is waited for
MAX_MESSAGE = 2**24


class PeerLost(ValueError):
    """Another process of the run ended, or was never reached."""

    exit_status = exit_status.PEER_LOST


class Connection:
    """A socket that carries JSON messages, one a line."""

    def __init__(self, sock: socket.socket):
        self.sock, self.heard, self.finished = sock, time.monotonic(), False
        self._buffer, self._lock = b'', threading.Lock()
        sock.settimeout(CLOSING_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, **message: Any) -> None:
        """Send a message; a connection that is broken is noticed by whoever reads from it."""
        with self._lock, contextlib.suppress(OSError):
            self.sock.sendall(json.dumps(message).encode() + b'\n')

    def receive(self) -> list[dict]:
        """The messages that have arrived; waits for the first bytes.

        Raises:
          EOFError: if the other side has closed the connection. ValueError: if it sends something else.
        """
        try:
            data = self.sock.recv(2**16)
        except TimeoutError:
            return []
        except OSError as error:
            raise EOFError(str(error)) from error
        if not data:
            raise EOFError('closed')
        self.heard = time.monotonic()
        *lines, self._buffer = (self._buffer + data).split(b'\n')
        messages = [json.loads(line) for line in lines]
        # what does not begin like a message is another protocol
        if len(self._buffer) > MAX_MESSAGE or self._buffer[:1] not in (b'', b'{') or not all(
                isinstance(message, dict) for message in messages):
            raise ValueError('not a message')
        return messages

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.close()


class Peers:
    """The connections of one process: process 0 has one to each other process, the others one to it.

    names: of all processes, for messages: 'process 1 (host)'. at_loss: returns what is saved, for the line
    with which a process ends when another is lost.
    """

    def __init__(self, index: int, connections: dict[int, Connection], names: list[str], silence_s: float):
        self.index, self.names, self.at_loss = index, names, lambda: 'run the same command again'
        self._connections, self._silence_s = connections, silence_s
        self._beats, self._own_beat = {}, {}
        self._round, self._answers = 0, {}
        self._values, self._judges = {}, {}
        self._changed, self._ending = threading.Condition(), None
        self._left = False
        threading.Thread(target=self._watch, name='peers', daemon=True).start()

    def agree(self, value: Any, judge: Callable[[list, list[str]], Any], name: str) -> Any:
        """The result, in every process, of judge([value of each process], names), which process 0 computes.

        All processes must call this in the same order; value and the result are what JSON can express.
        name: of the matter, for the message if others do not come.
        """
        deadline, notice = time.monotonic() + AGREE_S, Notice()
        with self._changed:
            self._round += 1
            number = self._round
            if self.index:
                self._connections[0].send(round=number, value=value)
            else:
                self._judges[number] = judge
                self._collect(number, 0, value)
            while number not in self._answers:
                missing = 'the other processes' if self.index else ', '.join(
                    text for i, text in enumerate(self.names) if i not in self._values[number])
                notice.show(f'waiting for {missing} to compare {name}')
                if time.monotonic() > deadline:
                    raise PeerLost(f'{missing} did not come to compare {name} within {AGREE_S:.0f} s; '
                                   f'{self.at_loss()}')
                self._changed.wait(1.0)
            return self._answers.pop(number)

    def _collect(self, number, index, value):
        values = self._values.setdefault(number, {})
        values[index] = value
        if len(values) == len(self.names) and number in self._judges:
            values = self._values.pop(number)
            result = self._judges.pop(number)([values[i] for i in range(len(self.names))], self.names)
            for connection in self._connections.values():
                connection.send(answer=number, result=result)
            self._answers[number] = result
            self._changed.notify_all()

    def report(self, **beat: float) -> None:
        """What the next beats of this process tell process 0."""
        self._own_beat = beat

    def reports(self) -> dict[int, dict]:
        """The last report of each process, in process 0; of itself only in the others."""
        return {**(self._beats if self.index == 0 else {}), self.index: self._own_beat}

    def leave(self, status: int, reason: str = '') -> None:
        """Tell the others that this process ends. Process 0 returns when they have ended too.

        reason: of a status that is not DONE or STOPPED; the others end with it.
        """
        self._left = True
        for connection in list(self._connections.values()):
            connection.send(bye=status, reason=reason)
            if self.index:
                with contextlib.suppress(OSError):
                    connection.sock.shutdown(socket.SHUT_WR)
        if not self.index:
            end = time.monotonic() + CLOSING_S
            while self._connections and time.monotonic() < end:
                time.sleep(0.02)
            time.sleep(0.1)

    def _watch(self):
        """The thread that reads, beats, and ends the process when another one is lost."""
        selector, beat_at, last = selectors.DefaultSelector(), 0.0, time.monotonic()
        for index, connection in self._connections.items():
            selector.register(connection.sock, selectors.EVENT_READ, index)
        while True:
            for key, _ in selector.select(0.1 if self._ending else BEAT_S / 2):
                if key.data in self._connections and not self._read(key.data):
                    selector.unregister(key.fileobj)
                    self._connections.pop(key.data).close()
            now = time.monotonic()
            if now - last > STOPPED_S:  # this process did not run: the others may have stood still with it
                for connection in self._connections.values():
                    connection.heard = now
            last = now
            if now >= beat_at:
                beat_at = now + BEAT_S
                for connection in list(self._connections.values()):
                    connection.send(beat=self._own_beat)
            for index, connection in self._connections.items():
                if now - connection.heard > self._silence_s and not connection.finished:
                    self._lose(index, f'has not answered for {self._silence_s:.0f} s')
            if self._ending and now >= self._ending[0] and not self._left:
                self._end(self._ending[1])

    def _read(self, index):
        """Handle what a process has sent. Returns False if it has closed the connection."""
        connection = self._connections[index]
        try:
            for message in connection.receive():
                self._handle(index, connection, message)
        except (EOFError, ValueError):
            if not connection.finished:
                self._lose(index, 'is gone')
            elif index == 0:
                self._lose(index, 'has ended')
            return False
        return True

    def _handle(self, index, connection, message):
        with self._changed:
            if 'beat' in message:
                self._beats[index] = message['beat']
            elif 'round' in message:
                self._collect(message['round'], index, message['value'])
            elif 'answer' in message:
                self._answers[message['answer']] = message['result']
                self._changed.notify_all()
        if 'lost' in message:
            self._set_ending(message['lost'], 0.0)
        elif 'bye' in message:
            connection.finished = True
            status, reason = message['bye'], message['reason'] and f' ({message["reason"]})'
            if status == exit_status.STOPPED:
                self._lose(index, 'has stopped', STOPPING_S)
            elif status != exit_status.DONE:
                self._lose(index, f'ended with status {status}{reason}', PATIENCE_S)

    def _lose(self, index, fate, patience_s=0.0):
        text = f'{self.names[index]} of {len(self.names)} {fate}'
        if index == 0 and not patience_s:  # jax is about to abort
            self._end(text)
        self._set_ending(text, patience_s)

    def _set_ending(self, text, patience_s):
        self._ending = min(self._ending or (math.inf, ''), (time.monotonic() + patience_s, text))

    def _end(self, text):
        if self._left:
            return
        try:
            saved = self.at_loss()
        except Exception:  # the line must come
            saved = 'the same command continues'
        self._left = True
        line = f'error: {text}; {saved}\n'
        if self.index == 0:
            for connection in list(self._connections.values()):
                connection.send(lost=text)
        self._exit(line)

    def _exit(self, line):
        write_now(line)
        if self.index == 0:  # the others read who is lost before they see this process end
            time.sleep(0.2)
        os._exit(exit_status.PEER_LOST)


class Notice:
    """Lines on stderr about a long wait."""

    def __init__(self):
        self._began = time.monotonic()
        self._next = self._began + NOTICE_S[0]

    def show(self, text: str) -> None:
        """Print the text and the seconds so far, if it is time for a line."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + NOTICE_S[1]
            write_line(f'{text}, for {now - self._began:.0f} s', sys.stderr)
