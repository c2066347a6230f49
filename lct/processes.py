"""The processes of a run: they join, agree on the next program, and end together.

Every process runs the same programs in the same order; a device blocks forever in a program that another
process did not start. So everything that decides on the next program (a signal, whether a file exists) is
agreed on first. A single process agrees with itself and computes nothing.
"""

import functools
import os
import sys
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lct import terminal

EXPLICIT = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')
SLURM = ('SLURM_JOB_ID', 'SLURM_STEP_NODELIST', 'SLURM_NTASKS', 'SLURM_PROCID', 'SLURM_LOCALID')


def cluster(environment: Mapping[str, str]) -> tuple[int | None, dict[str, Any]] | None:
    """Detect from its environment variables how this process was started.

    In this order: the three variables of EXPLICIT (experiments/launch.py, a Kubernetes JobSet); a SLURM step
    or an Open MPI job of several tasks; one or several TPU pod slices; LCT_CLUSTER=auto, which leaves the
    detection to jax.

    Returns:
      (number of processes, or None where jax will find out; arguments of jax.distributed.initialize), or None
      for a single process.
    Raises:
      ValueError: if the variables contradict each other.
    """
    if any(environment.get(name) for name in EXPLICIT[1:]):
        return _explicit(environment)
    if all(name in environment for name in SLURM) and int(environment['SLURM_NTASKS']) > 1:
        return int(environment['SLURM_NTASKS']), _slurm_arguments(environment)
    if 'OMPI_MCA_orte_hnp_uri' in environment and int(environment.get('OMPI_COMM_WORLD_SIZE', 1)) > 1:
        return int(environment['OMPI_COMM_WORLD_SIZE']), {'cluster_detection_method': 'ompi'}
    return (None, {}) if _detected_by_jax(environment) else None


def _explicit(environment):
    given = [name for name in EXPLICIT if environment.get(name)]
    if len(given) < len(EXPLICIT):
        missing = ', '.join(name for name in EXPLICIT if name not in given)
        raise ValueError(
            f'{", ".join(given)} set without {missing}; set all three, or none for a single process')
    address, count, index = (environment[name] for name in EXPLICIT)
    if not count.isdigit() or not index.isdigit() or int(index) >= int(count):
        raise ValueError(
            f'JAX_PROCESS_ID={index} of JAX_NUM_PROCESSES={count} must be a number from 0 to one less')
    arguments = {'coordinator_address': address, 'num_processes': int(count), 'process_id': int(index),
                 'cluster_detection_method': 'deactivate'}
    return None if int(count) == 1 else (int(count), arguments)


def _slurm_arguments(environment):
    arguments = {'cluster_detection_method': 'slurm'}
    if environment.get('SLURM_STEP_TASKS_PER_NODE', '').split('(')[0] == '1':
        # By default jax gives a SLURM task one GPU, even if it is alone on its node.
        arguments['local_device_ids'] = list(range(int(environment.get('SLURM_GPUS_ON_NODE') or 1)))
    return arguments


def _detected_by_jax(environment):
    """Whether this is one of several TPU workers or slices, or LCT_CLUSTER asks jax for the detection."""
    workers = environment.get('TPU_PROCESS_ADDRESSES') or environment.get('TPU_WORKER_HOSTNAMES') or ''
    several_slices = environment.get('MEGASCALE_COORDINATOR_ADDRESS')
    return ',' in workers or several_slices or environment.get('LCT_CLUSTER') == 'auto'


def join() -> int:
    """Connect to the other processes of the run, if there are any; call before jax computes anything.

    Returns:
      Their number; 1 where only jax will know it, on a TPU pod.
    Raises:
      ValueError: if they cannot connect, for example because the port is in use.
    """
    found = cluster(os.environ)
    if found is None:
        return 1
    count, arguments = found
    if not jax.distributed.is_initialized():
        # The service would swallow a SIGTERM that arrives before the training installs its own handler.
        jax.config.update('jax_enable_preemption_service', False)
        try:
            jax.distributed.initialize(**arguments)
        except RuntimeError as error:
            address = arguments.get('coordinator_address', 'the coordinator')
            raise ValueError(
                f'the processes cannot meet at {address} ({str(error).splitlines()[0]}); check that its port '
                'is free and reachable, and that all processes were started'
            ) from error
    return count or 1


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


def check_same(text: str, name: str) -> None:
    """Refuse a text that differs between processes, before their programs differ.

    name: of the text, for the message.

    Raises:
      ValueError: in every process.
    """
    number = zlib.crc32(text.encode()) >> 1
    if anyone(number != from_first(number)):
        raise ValueError(
            f'the processes differ in {name}; start all with the same command, files and versions')


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


def leave(code: int) -> None:
    """End this process with an exit code.

    One of several processes must skip the shutdown of jax.distributed, which would wait for the others: they
    are ended by their launcher, or by jax when the heartbeat stops.
    """
    terminal.flush()
    if not jax.distributed.is_initialized():
        sys.exit(code)
    os._exit(code)
