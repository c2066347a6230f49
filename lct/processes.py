"""The processes of a run: they join, agree on the next program, and end together.

Every process runs the same programs in the same order; a device blocks forever in a program that another
process did not start. So everything that decides on the next program (a signal, whether a file exists) is
agreed on first. A single process agrees with itself and computes nothing.
"""

import atexit
import functools
import os
import re
import secrets
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lct import abort_filter, clusters, exit_status, installation, meeting, terminal, watchdog
from lct.peers import PeerLost

JOIN_TIMEOUT_S = 120  # LCT_JOIN_TIMEOUT_S changes it
FOLDER_TIMEOUT_S = 60  # LCT_FOLDER_TIMEOUT_S changes it
LOSS_S = 5.0  # until a lost process is noticed, mostly
SILENCE_S = 60  # LCT_HEARTBEAT_TIMEOUT_S changes it
COMMUNICATION = re.compile(r'Gloo|NCCL|UNAVAILABLE|oordination service')  # in errors of jax

_peers = None  # the Peers of this process, once it has joined


def join() -> int:
    """Connect to the other processes of the run, if there are any; call before jax computes anything.

    Returns:
      Their number; 1 where only jax will know it, on a TPU pod.
    Raises:
      PeerLost: if a process did not come in time. ValueError: if the port is in use, or the processes differ
        in code, packages or flags.
    """
    place = clusters.find(os.environ)
    if place is None:
        return 1
    if jax.distributed.is_initialized():
        return place.count or 1
    # The service would swallow a SIGTERM that arrives before the training installs its own handler.
    jax.config.update('jax_enable_preemption_service', False)
    arguments = {}
    if place.count:
        _connect(place)
        arguments = {
            'coordinator_address': place.address, 'num_processes': place.count, 'process_id': place.index,
            'coordinator_bind_address': meeting.bind_address(place.address),
            'local_device_ids': place.local_device_ids, 'cluster_detection_method': 'deactivate'}
    try:
        # jax aborts with a stack trace when its own limits pass; ours are shorter
        jax.distributed.initialize(
            initialization_timeout=_seconds('LCT_JOIN_TIMEOUT_S', JOIN_TIMEOUT_S) + 30,
            heartbeat_timeout_seconds=max(100, 2 * _seconds('LCT_HEARTBEAT_TIMEOUT_S', SILENCE_S)),
            **arguments)
    except RuntimeError as error:
        raise PeerLost(
            f'the processes cannot meet at {place.address or "the coordinator"} '
            f'({str(error).splitlines()[0]}); check that its port is free and reachable, and that all '
            'processes were started'
        ) from error
    return place.count or 1


def _connect(place):
    global _peers
    _peers = meeting.meet(place, installation.describe(), _seconds('LCT_JOIN_TIMEOUT_S', JOIN_TIMEOUT_S),
                          _seconds('LCT_HEARTBEAT_TIMEOUT_S', SILENCE_S))
    atexit.register(_leave_normally)
    watchdog.tell_others = _peers.leave
    if place.index:  # process 0 runs the service whose loss makes jax abort
        abort_filter.filter_stderr()


def _seconds(variable, default):
    text = os.environ.get(variable) or str(default)
    if not text.isdigit() or not int(text):
        raise ValueError(f'{variable}={text} must be a whole number of seconds above 0')
    return int(text)


def at_loss(saved: Callable[[], str]) -> None:
    """Set what is said to be saved, and how to continue, when another process is lost."""
    if _peers:
        _peers.at_loss = saved


def measures_others() -> bool:
    """Whether this process has others to compare itself with."""
    return _peers is not None


def report(**values: float) -> None:
    """Tell process 0 a few numbers, with the next beat."""
    _peers.report(**values)


def reports() -> dict[int, dict]:
    """{process: its last report}, in process 0; of itself only in the others."""
    return _peers.reports()


def name_of(index: int) -> str:
    """The name of a process, with its host."""
    return _peers.names[index]


def is_first() -> bool:
    """Whether this is the first process, which writes the files and the log."""
    return jax.process_index() == 0


def anyone(flag: Any) -> Any:
    """Whether flag is true in any process.

    The result is computed asynchronously, after the programs that the devices already have in their queue:
    convert it with bool() as late as possible. A single process gets flag itself.
    """
    return flag if jax.process_count() == 1 else _largest(bool(flag))


def from_first(number: int) -> int:
    """The number >= 0 of the first process, in every process."""
    return int(number) if jax.process_count() == 1 else int(_largest(number if is_first() else 0))


def _own_host():
    """The address of this host in its network, from which nothing is sent here."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(('192.0.2.1', 9))  # an address reserved for documentation
            return probe.getsockname()[0]
        except OSError:
            return socket.getfqdn()


def _known_peers():
    """The Peers; where only jax knew the other processes they meet now, at a port of process 0."""
    global _peers
    if _peers is None:
        address = ''
        if is_first():
            with socket.create_server(('', 0)) as probe:
                address = f'{_own_host()}:{probe.getsockname()[1]}'
        text = np.frombuffer(address.encode().ljust(256), np.uint8)
        address = multihost_utils.broadcast_one_to_all(text).tobytes().decode().strip()
        _connect(clusters.Place('jax', jax.process_count(), jax.process_index(), address))
    return _peers


def check_same(values: Mapping[str, Any], name: str) -> None:
    """Refuse values that differ between processes, before their programs differ.

    values: {field: value}. name: of the values, for the message.

    Raises:
      ValueError: in every process, naming the fields and the processes.
    """
    if jax.process_count() == 1:
        return
    devices = jax.local_devices()
    values = {**values, 'its devices': f'{len(devices)} {devices[0].device_kind}'}
    different = _known_peers().agree(values, installation.differences, name)
    if different:
        raise ValueError(f'the processes differ in {name}: {different}; start all with the same command and '
                         'files')


def check_same_folder(folder: str | Path) -> None:
    """Refuse a folder that is not the same one in all processes; process 0 must have made it.

    Process 0 writes a file there and the others look for it for a while: network file systems show new files
    late.

    Raises:
      ValueError: in every process, naming those that do not see the file.
    """
    if jax.process_count() == 1:
        return
    peers, folder = _known_peers(), Path(folder).absolute()
    path = folder / f'.seen-by-all-{secrets.token_hex(8)}'
    try:
        if is_first():
            path.touch()
        name = peers.agree(path.name, lambda values, _: values[0], 'the work directory')
        end = time.monotonic() + _seconds('LCT_FOLDER_TIMEOUT_S', FOLDER_TIMEOUT_S)
        while not (found := folder.is_dir() and name in os.listdir(folder)) and time.monotonic() < end:
            time.sleep(0.2)
        different = peers.agree([str(folder), found], _describe_folders, 'the work directory')
    finally:
        if is_first():
            path.unlink(missing_ok=True)
    if different:
        raise ValueError(different)


def _describe_folders(values, names):
    blind = [(folder, name) for (folder, found), name in zip(values, names) if not found]
    if not blind:
        return ''
    more = f' and {len(blind) - 1} more' if len(blind) > 1 else ''
    return (f'the work directory {values[0][0]} of {names[0]} is not the folder {blind[0][0]} of '
            f'{blind[0][1]}{more}; name one on a file system that all hosts share, '
            'or for one in a bucket set LCT_CACHE_DIR to a folder there')


def wait_for_all() -> None:
    """Return when every process has called this."""
    from_first(0)


def _largest(number):
    """The largest of the processes' numbers, int32 [], computed asynchronously."""
    mesh = _device_mesh()
    own = jax.make_array_from_callback(
        (mesh.size,), NamedSharding(mesh, P('device')), lambda _: np.array([number], np.int32))
    with jax.set_mesh(mesh):
        return _max(own)


@functools.cache
def _device_mesh():
    return Mesh(np.array(jax.devices()), ('device',), axis_types=(AxisType.Auto,))


@functools.partial(jax.jit, out_shardings=P())
def _max(numbers):
    return jnp.max(numbers)


def leave(code: int, reason: str = '') -> None:
    """End this process with an exit code; the others are told.

    One of several processes must skip the shutdown of jax.distributed, which would wait for the others.

    reason: of a failure, a short phrase for the last line of the others.
    """
    terminal.flush()
    if _peers:
        _peers.leave(code, reason)
    if not jax.distributed.is_initialized():
        sys.exit(code)
    os._exit(code)


def _leave_normally():
    error = getattr(sys, 'last_value', None)  # an exception that nobody caught
    if error is not None:
        leave(exit_status.ERROR, ' '.join(str(error).split())[:200] or type(error).__name__)
    _peers.leave(exit_status.DONE)


def explain(error: Exception) -> Exception:
    """The error to report: error itself, or a PeerLost if it comes from a connection of jax to another
    process. Whoever that is is found in the meantime, mostly, which ends this process in one line."""
    if not _peers or not COMMUNICATION.search(str(error)):
        return error
    time.sleep(LOSS_S)
    text = str(error).strip().splitlines()[0][:200]
    return PeerLost(f'a connection to another process failed ({text}); {_peers.at_loss()}')
