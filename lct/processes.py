"""The processes of a run: how they find each other, agree, and end together.

Every process runs the same programs in the same order; a device waits for ever for one that is not started
elsewhere. So whatever decides about the next program (a signal, a file that is there or not) is agreed on
first. Alone, a process answers itself and computes nothing.
"""

import functools
import os
import sys
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

EXPLICIT = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')
SLURM = ('SLURM_JOB_ID', 'SLURM_STEP_NODELIST', 'SLURM_NTASKS', 'SLURM_PROCID', 'SLURM_LOCALID')


def cluster(environment):
    """How this process was started, from its environment variables.

    In this order: the three of EXPLICIT (experiments/launch.py, a Kubernetes JobSet); a SLURM step or an Open
    MPI job of several tasks; a TPU pod slice or several; LCT_CLUSTER=auto, which asks the cloud as jax does.

    Returns:
      (number of processes or None where jax will find out, arguments of jax.distributed.initialize), or None
      for a process on its own.
    Raises:
      ValueError: if the variables contradict each other.
    """
    given = [name for name in EXPLICIT if environment.get(name)]
    if set(given) & set(EXPLICIT[1:]):
        return _explicit(environment, given)
    if all(name in environment for name in SLURM) and int(environment['SLURM_NTASKS']) > 1:
        arguments = {'cluster_detection_method': 'slurm'}
        if environment.get('SLURM_STEP_TASKS_PER_NODE', '').split('(')[0] == '1':
            # left alone, jax gives a task of SLURM one GPU, also where it has the node to itself
            arguments['local_device_ids'] = list(range(int(environment.get('SLURM_GPUS_ON_NODE') or 1)))
        return int(environment['SLURM_NTASKS']), arguments
    if 'OMPI_MCA_orte_hnp_uri' in environment and int(environment.get('OMPI_COMM_WORLD_SIZE', 1)) > 1:
        return int(environment['OMPI_COMM_WORLD_SIZE']), {'cluster_detection_method': 'ompi'}
    workers = environment.get('TPU_PROCESS_ADDRESSES') or environment.get('TPU_WORKER_HOSTNAMES') or ''
    if ',' in workers or environment.get('MEGASCALE_COORDINATOR_ADDRESS') or environment.get('LCT_CLUSTER') == 'auto':
        return None, {}
    return None


def _explicit(environment, given):
    if len(given) < len(EXPLICIT):
        missing = ', '.join(name for name in EXPLICIT if name not in given)
        raise ValueError(f'{", ".join(given)} set without {missing}; set all three, or none for a single process')
    address, count, index = (environment[name] for name in EXPLICIT)
    if not count.isdigit() or not index.isdigit() or int(index) >= int(count):
        raise ValueError(f'JAX_PROCESS_ID={index} of JAX_NUM_PROCESSES={count} must be a number from 0 to one less')
    arguments = {'coordinator_address': address, 'num_processes': int(count), 'process_id': int(index),
                 'cluster_detection_method': 'deactivate'}
    return None if int(count) == 1 else (int(count), arguments)


def join():
    """Meet the other processes of the run, if it has any. Must come before jax computes anything.

    Returns:
      Their number; 1 where only jax will know it, on a TPU pod.
    Raises:
      ValueError: if they cannot meet, for example because the port is in use.
    """
    found = cluster(os.environ)
    if found is None:
        return 1
    count, arguments = found
    if not jax.distributed.is_initialized():
        # it would swallow a SIGTERM that comes before the training has begun to listen
        jax.config.update('jax_enable_preemption_service', False)
        try:
            jax.distributed.initialize(**arguments)
        except RuntimeError as error:
            where = arguments.get('coordinator_address', 'the coordinator')
            raise ValueError(
                f'the processes cannot meet at {where} ({str(error).splitlines()[0]}); look whether its port is free '
                'and reachable, and whether all processes were started'
            ) from error
    return count or 1


def is_first():
    """Whether this process is the one that writes files and speaks."""
    return jax.process_index() == 0


def anyone(asked):
    """Whether asked is true in any process. Read the answer with bool(), late: it comes behind the programs
    that the devices have in hand. Alone, the answer is asked itself, as it is when it is read."""
    return asked if jax.process_count() == 1 else _largest(bool(asked))


def from_first(number):
    """The number >= 0 that the first process gives."""
    return int(number) if jax.process_count() == 1 else int(_largest(number if is_first() else 0))


def check_same(text, what):
    """Refuse a text that differs from the first process's, before what follows from it differs as well."""
    number = zlib.crc32(text.encode()) >> 1
    if anyone(number != from_first(number)):
        raise ValueError(f'the processes differ in {what}; start all with the same command, files and versions')


def wait_for_all():
    """Come back when every process has come here."""
    from_first(0)


def _largest(number):
    """The largest of the processes' numbers, on its way: int32 []."""
    mesh = _line()
    own = jax.make_array_from_callback(
        (mesh.size,), NamedSharding(mesh, P('device')), lambda _: np.array([number], np.int32))
    with jax.set_mesh(mesh):
        return _max(own)


@functools.cache
def _line():
    return Mesh(np.array(jax.devices()), ('device',), axis_types=(AxisType.Auto,))


@functools.partial(jax.jit, out_shardings=P())
def _max(numbers):
    return jnp.max(numbers)


def leave(code):
    """End this process. One of several must not stay to say goodbye, as the others do not know that it goes:
    they are ended by whoever started them, or by jax when the heartbeat stops."""
    if not jax.distributed.is_initialized():
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
