"""Processes that meet, compare themselves, and miss each other; here they are threads."""

import concurrent.futures
import json
import re
import socket
import time

import pytest

from lct import abort_filter, exit_status, installation, meeting, peers
from lct.clusters import Place

SAME = {'jax': '0.12.0', 'XLA_FLAGS': ''}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for module, name, value in ((peers, 'BEAT_S', 0.1), (peers, 'PATIENCE_S', 0.1), (peers, 'CLOSING_S', 1.0),
                                (meeting, 'FOREIGN_S', 0.6), (peers, 'NOTICE_S', (0.2, 9.0))):
        monkeypatch.setattr(module, name, value)


@pytest.fixture
def endings(monkeypatch):
    """The last lines of processes that ended, by their index."""
    lines = {}
    monkeypatch.setattr(peers.Peers, '_exit', lambda self, line: lines.setdefault(self.index, line.strip()))
    return lines


@pytest.fixture
def address():
    with socket.create_server(('127.0.0.1', 0)) as probe:
        return f'127.0.0.1:{probe.getsockname()[1]}'


def together(address, described, indices=None, count=None, limit_s=5.0, silence_s=5.0):
    """The Peers of each process, or the error it met, in the order of described."""
    indices = range(len(described)) if indices is None else indices
    places = [Place('test', count or len(described), i, address) for i in indices]
    with concurrent.futures.ThreadPoolExecutor(len(places)) as pool:
        futures = [pool.submit(meeting.meet, place, one, limit_s, silence_s)
                   for place, one in zip(places, described)]
        return [future.exception() or future.result() for future in futures]


def until(condition, limit_s=5.0):
    end = time.monotonic() + limit_s
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    assert condition()


def close(group):
    with concurrent.futures.ThreadPoolExecutor(len(group)) as pool:
        list(pool.map(lambda one: one.leave(exit_status.DONE), group))


# -- the meeting ---------------------------------------------------------------------------------------


def test_three_meet_agree_and_leave_without_a_word(address, endings):
    group = together(address, [SAME] * 3)
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        sums = list(pool.map(lambda one: one.agree(one.index + 1, lambda values, _: sum(values), 'x'), group))
        seeds = lambda one: one.agree({'seed': min(one.index, 1)}, installation.differences, 'x')
        texts = list(pool.map(seeds, group))
    assert sums == [6, 6, 6]
    host = socket.gethostname()
    assert set(texts) == {f'seed is 0 in process 0 ({host}) but 1 in process 1 ({host}), process 2 ({host})'}
    group[0], group[2] = group[2], group[0]
    close(group)
    time.sleep(0.3)
    assert not endings


def test_a_difference_is_named_in_every_process(address):
    first, second = together(address, [SAME, {**SAME, 'jax': '0.10.2'}])
    assert str(first) == str(second) and isinstance(first, ValueError)
    host = socket.gethostname()
    assert f'jax is 0.12.0 in process 0 ({host}) but 0.10.2 in process 1 ({host}); start all' in str(first)


def test_who_does_not_come_is_named_in_every_process(address, capfd):
    first, second = together(address, [SAME] * 2, indices=(0, 2), count=4, limit_s=0.8)
    assert str(first) == str(second) and first.exit_status == exit_status.PEER_LOST
    assert f'process 1, 3 of 4 did not come to {address} within 1 s; check' in str(first)
    assert re.search(f'waiting at {address} for process 1,.* of 4, for ', capfd.readouterr().err)


def test_process_0_that_does_not_come(address, capfd):
    [error] = together(address, [SAME], indices=(1,), count=2, limit_s=0.8)
    assert error.exit_status == exit_status.PEER_LOST
    assert f'of 2 did not reach process 0 at {address} within 1 s (Connection refused)' in str(error)
    assert f'waiting for {address}, process 0 of 2 (Connection refused), for ' in capfd.readouterr().err


def test_a_number_given_twice(address):
    errors = together(address, [SAME] * 3, indices=(0, 1, 1), count=3)
    assert len({str(error) for error in errors}) == 1
    assert 'both process 1 (' in str(errors[0]) and 'are process 1 of 3; give each' in str(errors[0])


def test_another_number_of_processes(address):
    place = [Place('test', count, i, address) for i, count in enumerate((2, 3))]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(meeting.meet, one, SAME, 5.0, 5.0) for one in place]
        errors = {str(future.exception()) for future in futures}
    assert len(errors) == 1 and 'was started as one of 3 but process 0' in errors.pop()


def test_a_port_in_use(address):
    port = int(address.split(':')[1])
    with socket.create_server(('127.0.0.1', port)):
        [error] = together(address, [SAME], count=2)
    assert isinstance(error, ValueError) and f'process 0 cannot listen at {address}' in str(error)
    assert 'the port is in use' in str(error) and not isinstance(error, peers.PeerLost)


def test_another_program_at_the_address(address):
    port = int(address.split(':')[1])
    with socket.create_server(('127.0.0.1', port)) as server:
        def answer():
            for _ in range(9):
                connection, _ = server.accept()
                connection.sendall(b'\x00\x00\x12\x04')  # HTTP/2, as a jax coordinator
                connection.close()

        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            pool.submit(answer)
            [error] = together(address, [SAME], indices=(1,), count=2, limit_s=5.0)
            server.shutdown(socket.SHUT_RDWR)
    assert 'another program answers there' in str(error)


def test_strangers_at_the_port_do_not_disturb(address):
    def stranger():
        until(lambda: not socket.socket().connect_ex(('127.0.0.1', int(address.split(':')[1]))))
        for text in (b'GET / HTTP/1.1\r\n\r\n', b'{"index": "a"}\n', b'[1]\n', b''):
            with socket.create_connection(('127.0.0.1', int(address.split(':')[1]))) as sock:
                sock.sendall(text)
        return together(address, [SAME], indices=(1,), count=2)[0]

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        other = pool.submit(stranger)
        [first] = together(address, [SAME], count=2)
        close([first, other.result()])


@pytest.mark.parametrize(('address', 'variable', 'expected'), [
    ('127.0.0.1:5', None, '127.0.0.1:5'), ('localhost:5', None, 'localhost:5'), ('[::1]:5', None, '[::1]:5'),
    ('node1:5', None, '[::]:5'), ('10.0.0.1:5', None, '[::]:5'), ('10.0.0.1:5', '10.0.0.1:5', '10.0.0.1:5'),
])
def test_only_a_run_over_several_hosts_listens_to_the_network(address, variable, expected, monkeypatch):
    monkeypatch.delenv('JAX_COORDINATOR_BIND_ADDRESS', raising=False)
    if variable:
        monkeypatch.setenv('JAX_COORDINATOR_BIND_ADDRESS', variable)
    assert meeting.bind_address(address) == expected


# -- who is lost ---------------------------------------------------------------------------------------


def die(one):
    """Break the connections of a process, as its end does."""
    one._left = True
    for connection in list(one._connections.values()):
        connection.sock.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(('dying', 'survivors'), [(1, (0, 2)), (0, (1, 2))])
def test_one_that_dies_is_named_by_all_others(address, endings, dying, survivors):
    group = together(address, [SAME] * 3)
    for one in group:
        one.at_loss = lambda: 'step 4 is saved'
    die(group[dying])
    until(lambda: len(endings) == 2)
    assert sorted(endings) == sorted(survivors)
    host = socket.gethostname()
    assert set(endings.values()) == {f'error: process {dying} ({host}) of 3 is gone; step 4 is saved'}


def test_one_that_falls_silent_is_named(address, endings, monkeypatch):
    group = together(address, [SAME] * 3, silence_s=0.5)
    send = peers.Connection.send
    silent = group[1]._connections[0]
    monkeypatch.setattr(peers.Connection, 'send',
                        lambda self, **message: None if self is silent else send(self, **message))
    until(lambda: {0, 2} <= set(endings))
    assert 'process 1' in endings[0] and 'has not answered for' in endings[0] and endings[0] == endings[2]
    close(group)


def test_one_that_ends_with_an_error_tells_it_and_one_with_the_same_error_ends_by_itself(address, endings):
    group = together(address, [SAME] * 3)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda one: one.leave(exit_status.ERROR, 'no such file'), (group[1], group[0])))
    until(lambda: endings)
    assert list(endings) == [2] and 'ended with status 1 (no such file); run the same' in endings[2]


def test_agreeing_with_one_that_is_late_is_reported(address, capfd):
    first, second = together(address, [SAME] * 2)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        early = pool.submit(first.agree, 1, lambda values, _: values, 'their config')
        time.sleep(1.3)
        assert second.agree(2, None, 'their config') == early.result() == [1, 2]
    assert f'waiting for process 1 ({socket.gethostname()}) to compare their config' in capfd.readouterr().err
    close([first, second])


# -- what is compared ----------------------------------------------------------------------------------


def test_the_description_covers_code_packages_and_flags(monkeypatch):
    monkeypatch.setenv('XLA_FLAGS', '--b=2 --xla_dump_to=/x/1 --a=1')
    found = installation.describe()
    assert found['XLA_FLAGS'] == '--a=1 --b=2' and found['numpy'] and found['jax_enable_x64'] == 'False'
    assert {'the code of lct/peers.py', 'the code of lct/ops/rope.py', 'Python', 'jaxlib'} <= set(found)
    assert json.loads(json.dumps(found)) == found


def test_differences_are_few_and_short():
    values = [{'a': 1, 'long': 'x' * 999}, {'a': 2, 'long': 'x' * 998 + 'y', 'c': 1, 'd': 2}] + [{'a': 1}] * 4
    names = [f'p{i}' for i in range(6)]
    text = installation.differences(values, names)
    assert text.startswith('a is 1 in p0, p2, p3 and 2 others but 2 in p1, and c is absent in p0, p2, p3')
    assert text.endswith(', and 1 more') and len(text) < 250
    assert installation.differences(values[2:], names[2:]) == ''
    long = installation.differences([{'long': 'x' * 999}, {'long': 'x' * 998 + 'y'}], names)
    assert len(long) < 300 and long.count('crc') == 2


# -- stderr --------------------------------------------------------------------------------------------

ABORT = [b'E1129 coordination_service_agent.cc:289] Polled an error from coordination service (this can be\n',
         b'F1129 client.h:80] ' + abort_filter.ABORT + b'. This most likely indicates\n',
         b'*** Check failure stack trace: ***\n', b'    @     0x7f7db0e40634  absl\n']


def test_the_abort_of_jax_is_left_out_and_nothing_else():
    own, other = b'error: process 0 (a) of 2 is gone; step 4\n', b'F1129 check.cc:1] Check failed: x\n'
    keep = lambda lines: list(abort_filter.without_abort(lines))
    assert keep([other, *ABORT[:3], own, ABORT[3]]) == [other, own]
    assert keep([own, *ABORT]) == [own]
    assert keep([b'error: before\n', *ABORT]) == [b'error: before\n', abort_filter.REPLACEMENT]
    assert keep([other, ABORT[2], b'no newline']) == [other, ABORT[2], b'no newline']
