"""How the processes of a run find each other at the address of process 0, with a limit in time."""

import errno
import ipaddress
import os
import selectors
import socket
import time

from lct import exit_status
from lct.clusters import Place
from lct.installation import differences
from lct.peers import Connection, Notice, PeerLost, Peers

START_AGAIN = ('check that all processes were started and can reach this port, and start all again '
               '(LCT_JOIN_TIMEOUT_S sets the limit)')
FOREIGN_S = 10.0  # so long another program may answer at the address, such as the run before this one


def meet(place: Place, described: dict[str, str], limit_s: float, silence_s: float) -> Peers:
    """Connect this process to process 0, or as process 0 wait for all others.

    Args:
      described: what must be the same in all processes, installation.describe().
      limit_s: seconds after which a process that does not come counts as lost.
      silence_s: seconds without a beat after which a connected process counts as lost.
    Raises:
      PeerLost: if a process did not come in time, naming it.
      ValueError: if the port is in use, two processes have one number, or the processes differ.
    """
    hello = {'lct': 1, 'index': place.index, 'count': place.count, 'host': socket.gethostname(),
             'pid': os.getpid(), 'described': described}
    if place.index:
        connection, names = _visit(place, hello, limit_s)
        return Peers(place.index, {0: connection}, names, silence_s)
    connections, names = _Host(place, hello, limit_s).receive()
    return Peers(0, connections, names, silence_s)


def split_address(address: str) -> tuple[str, int]:
    """(host, port) of 'host:port' or '[IPv6]:port'."""
    host, _, port = address.rpartition(':')
    return host.strip('[]'), int(port)


def bind_address(address: str) -> str:
    """Where process 0 listens, as jax.distributed takes it: on all interfaces, unless the address is a
    loopback one or JAX_COORDINATOR_BIND_ADDRESS names another."""
    host, port = split_address(address)
    try:
        local = ipaddress.ip_address('127.0.0.1' if host == 'localhost' else host).is_loopback
    except ValueError:
        local = False
    return os.environ.get('JAX_COORDINATOR_BIND_ADDRESS') or (address if local else f'[::]:{port}')


def listen(address: str) -> socket.socket:
    """A socket that listens at bind_address(address).

    Raises:
      ValueError: if the port is in use or the address is not of this machine. jax would end in a crash.
    """
    host, port = split_address(bind_address(address))
    try:
        if host == '::':
            if socket.has_dualstack_ipv6():
                return socket.create_server(('', port), family=socket.AF_INET6, dualstack_ipv6=True,
                                            backlog=4096)
            host = ''
        family = socket.AF_INET6 if ':' in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=4096)
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        if getattr(error, 'errno', 0) == errno.EADDRINUSE:
            reason = 'the port is in use, perhaps by an earlier run'
        raise ValueError(
            f'process 0 cannot listen at {address} on {socket.gethostname()} ({reason}); end what uses it, '
            'or set JAX_COORDINATOR_ADDRESS (or JAX_COORDINATOR_PORT) to a free port of the host of process 0'
        ) from error


class _Host:
    """Process 0 while it waits for the others."""

    def __init__(self, place, hello, limit_s):
        self._place, self._limit_s = place, limit_s
        self._hellos, self._connections = {0: hello}, {}

    def receive(self):
        """Returns ({index: Connection}, names of all processes)."""
        place, waiting = self._place, {}
        deadline, notice = time.monotonic() + self._limit_s, Notice()
        server = listen(place.address)
        with server, selectors.DefaultSelector() as selector:
            selector.register(server, selectors.EVENT_READ)
            while len(self._hellos) < place.count:
                for key, _ in selector.select(0.5):
                    if key.fileobj is server:
                        sock = server.accept()[0]
                        waiting[sock] = Connection(sock)
                        selector.register(sock, selectors.EVENT_READ)
                    elif not self._read(waiting[key.fileobj]):
                        selector.unregister(key.fileobj)
                        waiting.pop(key.fileobj)
                missing = [i for i in range(place.count) if i not in self._hellos]
                text = f'process {_numbers(missing)} of {place.count}'
                if missing and time.monotonic() > deadline:
                    within = f'within {self._limit_s:.0f} s'
                    self._refuse(PeerLost(f'{text} did not come to {place.address} {within}; {START_AGAIN}'))
                notice.show(f'waiting at {place.address} for {text}')
        names = [_name(self._hellos[i]) for i in range(place.count)]
        different = differences([self._hellos[i]['described'] for i in range(place.count)], names)
        if different:
            self._refuse(ValueError(f'the processes of this run differ: {different}; start all with the same '
                                    'code, packages and flags'))
        for connection in self._connections.values():
            connection.send(names=names)
        return self._connections, names

    def _read(self, connection):
        """Read the hello of a process. Returns False once no more is expected from the socket."""
        try:
            messages = connection.receive()
        except (EOFError, ValueError):
            connection.close()
            return False
        if not messages:
            return True
        [hello] = messages
        index, count = hello.get('index'), hello.get('count')
        if not isinstance(index, int) or 'described' not in hello:
            connection.close()
            return False
        known, total = self._hellos.get(index), self._place.count
        self._connections[index if not known else -1] = connection
        if count != total or not 0 <= index < total:
            self._refuse(ValueError(
                f'{_name(hello)} was started as one of {count} but {_name(self._hellos[0])} as one of '
                f'{total}; give all the same number of processes'))
        if known:
            self._refuse(ValueError(
                f'both {_name(known)}, pid {known["pid"]}, and {hello["host"]}, pid {hello["pid"]}, are '
                f'process {index} of {total}; give each process a number of its own (JAX_PROCESS_ID, or the '
                'rank of the launcher)'))
        self._hellos[index] = hello
        return False

    def _refuse(self, error):
        """Tell the processes that came, and raise the error."""
        status = getattr(error, 'exit_status', exit_status.ERROR)
        for connection in self._connections.values():
            connection.send(refused=str(error), status=status)
            connection.close()
        raise error


def _visit(place, hello, limit_s):
    """Connect to process 0. Returns (Connection, names of all processes)."""
    host, port = split_address(place.address)
    began, notice, reason, foreign_at = time.monotonic(), Notice(), 'no answer', None
    while (left := began + limit_s - time.monotonic()) > 0:
        notice.show(f'waiting for {place.address}, process 0 of {place.count} ({reason})')
        try:
            connection = Connection(socket.create_connection((host, port), timeout=min(left, 5)))
        except OSError as error:  # not yet listening, or its name not yet known
            reason = error.strerror or str(error)
            time.sleep(0.2)
            continue
        connection.send(**hello)
        try:
            # process 0 has its own limit and tells the reason
            answer = _answer(connection, began + limit_s + FOREIGN_S, place, notice)
        except (EOFError, ValueError):
            connection.close()
            reason = 'another program answers there, or the run has begun without this process'
            foreign_at = foreign_at or time.monotonic()
            if time.monotonic() > foreign_at + FOREIGN_S:
                break
            time.sleep(0.5)
            continue
        if 'names' in answer:
            return connection, answer['names']
        kind = PeerLost if answer['status'] == exit_status.PEER_LOST else ValueError
        raise kind(answer['refused'])
    raise PeerLost(
        f'{_name(hello)} of {place.count} did not reach process 0 at {place.address} within '
        f'{time.monotonic() - began:.0f} s ({reason}); {START_AGAIN}')


def _answer(connection, deadline, place, notice):
    connection.sock.settimeout(0.5)
    while time.monotonic() < deadline:
        for message in connection.receive():
            if 'names' in message or 'refused' in message and 'status' in message:
                connection.sock.settimeout(10.0)
                return message
            raise ValueError('not an answer')
        notice.show(f'waiting for the other processes at {place.address}')
    raise EOFError('no answer')


def _name(hello):
    return f'process {hello["index"]} ({hello["host"]})'


def _numbers(numbers, most=8):
    more = f' and {len(numbers) - most} more' if len(numbers) > most else ''
    return ', '.join(map(str, numbers[:most])) + more
