"""Where a process stands among the processes of its run, as the program that started it says."""

import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple


class Place(NamedTuple):
    """The place of a process in a run of several.

    launcher: what started it. count: number of processes. index: of this process. address: 'host:port' of
    process 0. local_device_ids: the GPUs of this host that it uses, None for all.
    On TPU pods jax finds these out itself: count and index are None and address is ''.
    """

    launcher: str
    count: int | None
    index: int | None
    address: str
    local_device_ids: tuple[int, ...] | None = None


class Launcher(NamedTuple):
    """The environment variables that a launcher sets; of several names for one value the first one set."""

    name: str
    count: str
    index: str
    local_index: tuple[str, ...]
    local_count: tuple[str, ...] = ()


EXPLICIT = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')
SLURM_STEP = ('SLURM_JOB_ID', 'SLURM_STEP_NODELIST', 'SLURM_NTASKS', 'SLURM_PROCID', 'SLURM_LOCALID')
# The innermost launcher first: torchrun and mpirun are often started by srun and inherit its variables.
LAUNCHERS = (
    Launcher('torchrun', 'WORLD_SIZE', 'RANK', ('LOCAL_RANK',), ('LOCAL_WORLD_SIZE',)),
    Launcher('Open MPI', 'OMPI_COMM_WORLD_SIZE', 'OMPI_COMM_WORLD_RANK', ('OMPI_COMM_WORLD_LOCAL_RANK',),
             ('OMPI_COMM_WORLD_LOCAL_SIZE',)),
    Launcher('MVAPICH', 'MV2_COMM_WORLD_SIZE', 'MV2_COMM_WORLD_RANK', ('MV2_COMM_WORLD_LOCAL_RANK',),
             ('MV2_COMM_WORLD_LOCAL_SIZE',)),
    Launcher('jsrun', 'JSM_NAMESPACE_SIZE', 'JSM_NAMESPACE_RANK', ('JSM_NAMESPACE_LOCAL_RANK',),
             ('JSM_NAMESPACE_LOCAL_SIZE',)),
    Launcher('SLURM', 'SLURM_NTASKS', 'SLURM_PROCID', ('SLURM_LOCALID',)),
    # Hydra (MPICH, Intel MPI), and PALS of HPE Cray
    Launcher('MPICH', 'PMI_SIZE', 'PMI_RANK', ('PALS_LOCAL_RANKID', 'PMI_LOCAL_RANK', 'MPI_LOCALRANKID'),
             ('PALS_LOCAL_SIZE', 'PMI_LOCAL_SIZE', 'MPI_LOCALNRANKS')),
)
RANKS_WITHOUT_COUNT = ('PMIX_RANK', 'PALS_RANKID', 'ALPS_APP_PE')
HOST_FILES = ('PBS_NODEFILE', 'PE_HOSTFILE')  # a host at the start of each line
JOB_NAMES = ('PMIX_NAMESPACE', 'OMPI_MCA_orte_hnp_uri', 'PBS_JOBID', 'LSB_JOBID', 'JOB_ID')
FIRST_PORT, NUM_PORTS = 61440, 4096  # the ports that jax takes too: above those of outgoing connections
REMEDY = ('set JAX_COORDINATOR_ADDRESS to host:port of process 0, and where the launcher gives no numbers '
          'also JAX_NUM_PROCESSES and JAX_PROCESS_ID')


def find(environment: Mapping[str, str]) -> Place | None:
    """Find the place of this process from its environment variables.

    In this order: the three variables of EXPLICIT (experiments/launch.py, a Kubernetes JobSet); LAUNCHERS;
    one or several TPU pod slices; LCT_CLUSTER=auto, which leaves the detection to jax.

    Returns:
      The place, or None for a single process.
    Raises:
      ValueError: if the variables contradict each other, or tell of other processes but not how to join them:
        otherwise every process would train by itself.
    """
    if any(environment.get(name) for name in EXPLICIT[1:]):
        return _explicit(environment)
    for launcher in LAUNCHERS:
        if _applies(launcher, environment):
            count = int(environment[launcher.count])
            return _launched(launcher, count, environment) if count > 1 else None
    if _detected_by_jax(environment):
        return Place('jax', None, None, '')
    _refuse_unknown(environment)
    return None


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
    _check_address(address)
    return None if int(count) == 1 else Place('JAX_NUM_PROCESSES', int(count), int(index), address)


def _check_address(address):
    host, _, port = address.rpartition(':')
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f'JAX_COORDINATOR_ADDRESS={address} must be host:port, such as 10.0.0.1:8476')


def _applies(launcher, environment):
    values = [environment.get(name, '') for name in (launcher.count, launcher.index)]
    if not all(value.isdigit() for value in values):
        return False
    if launcher.name != 'SLURM':
        return True
    # Outside of srun the variables describe the allocation; under mpiexec they count its daemons.
    return all(name in environment for name in SLURM_STEP) and (
        environment.get('PMI_SIZE', environment['SLURM_NTASKS']) == environment['SLURM_NTASKS'])


def _launched(launcher, count, environment):
    index = int(environment[launcher.index])
    if index >= count:
        raise ValueError(f'{launcher.index}={index} must be below {launcher.count}={count}')
    local_count = _number(environment, launcher.local_count)
    if launcher.name == 'SLURM':
        tasks = environment.get('SLURM_STEP_TASKS_PER_NODE', '').split('(')[0]  # such as 8(x2)
        local_count = int(tasks) if tasks.isdigit() else None
    address = _address(launcher, count, local_count, environment)
    local_index = _number(environment, launcher.local_index)
    return Place(launcher.name, count, index, address,
                 _local_devices(local_index, local_count, environment))


def _number(environment, names):
    return next((int(environment[name]) for name in names if environment.get(name, '').isdigit()), None)


def _local_devices(local_index, local_count, environment):
    """An equal share of a host's GPUs for each of its processes, one where their number is not known.

    None, all that it can see, for a process that is alone there or to which the launcher shows only its own.
    """
    shown = len([gpu for gpu in environment.get('CUDA_VISIBLE_DEVICES', '').split(',') if gpu.strip()])
    on_host = _number(environment, ('SLURM_GPUS_ON_NODE',))
    if local_index is None or local_count == 1 or shown == 1 or shown and on_host and shown < on_host:
        return None
    number = shown or on_host
    if not number or not local_count or number < local_count:
        return (local_index,)
    if number % local_count:
        raise ValueError(f'{number} GPUs of this host cannot be shared evenly by its {local_count} '
                         'processes; start one process per GPU or one per host')
    share = number // local_count
    return tuple(range(local_index * share, (local_index + 1) * share))


def _address(launcher, count, local_count, environment):
    if environment.get('JAX_COORDINATOR_ADDRESS'):
        _check_address(environment['JAX_COORDINATOR_ADDRESS'])
        return environment['JAX_COORDINATOR_ADDRESS']
    host = environment.get('MASTER_ADDR') if launcher.name != 'SLURM' else None
    if not host and local_count == count:
        host = '127.0.0.1'
    host = host or _first_host(launcher, environment)
    if not host:
        raise ValueError(f'{launcher.count}={count} ({launcher.name}) but the host of process 0 is not known;'
                         f' {REMEDY}')
    return f'{f"[{host}]" if ":" in host else host}:{_port(launcher, environment)}'


def _first_host(launcher, environment):
    """The host of process 0 of an MPI job or a SLURM step, or None."""
    if launcher.name == 'Open MPI':  # mpirun runs on the first host
        uri = environment.get('OMPI_MCA_orte_hnp_uri', '')
        version_4 = re.search(r'tcp://([^,:;]+)|tcp6://\[([^,\]]+)', uri)
        version_5 = re.match(r'prte(?:run)?-(.+)-\d+@', environment.get('PMIX_NAMESPACE', ''))
        if version_4 or version_5:
            return next(filter(None, (version_4 or version_5).groups()))
    nodes = environment.get('SLURM_STEP_NODELIST') if launcher.name == 'SLURM' else None
    nodes = nodes or environment.get('SLURM_JOB_NODELIST', '')
    if match := re.match(r'([^,\[]+)(?:\[([^,\-\]]+)[^\]]*\])?', nodes):  # node[001-015,020],other
        return match[1] + (match[2] or '')
    for name in HOST_FILES:
        path = Path(environment.get(name) or '/nowhere')
        if path.is_file() and (text := path.read_text().split()):
            return text[0]
    return None


def _port(launcher, environment):
    """A port that all processes of the run agree on, and those of other runs mostly do not."""
    if environment.get('JAX_COORDINATOR_PORT'):
        return environment['JAX_COORDINATOR_PORT']
    if launcher.name != 'SLURM' and environment.get('MASTER_PORT', '').isdigit():
        # the agent of torchrun may keep the port itself for its own store
        return int(environment['MASTER_PORT']) + (launcher.name == 'torchrun')
    if environment.get('SLURM_JOB_ID', '').isdigit():
        step = _number(environment, ('SLURM_STEP_ID',)) or 0
        return FIRST_PORT + (int(environment['SLURM_JOB_ID']) + step) % NUM_PORTS
    name = next((environment[name] for name in JOB_NAMES if environment.get(name)), '')
    return FIRST_PORT + zlib.crc32(name.encode()) % NUM_PORTS


def _detected_by_jax(environment):
    """Whether this is one of several TPU workers or slices, or LCT_CLUSTER asks jax for the detection."""
    workers = environment.get('TPU_PROCESS_ADDRESSES') or environment.get('TPU_WORKER_HOSTNAMES') or ''
    several_slices = environment.get('MEGASCALE_COORDINATOR_ADDRESS')
    return ',' in workers or several_slices or environment.get('LCT_CLUSTER') == 'auto'


def _refuse_unknown(environment):
    counts = [launcher.count for launcher in LAUNCHERS if launcher.name != 'SLURM']
    for name in counts:
        if environment.get(name, '1') not in ('', '0', '1'):
            index = next(launcher.index for launcher in LAUNCHERS if launcher.count == name)
            raise ValueError(f'{name}={environment[name]} tells of several processes, but {index} does not '
                             f'say which one this is; {REMEDY}, or unset {name} for a single process')
    for name in RANKS_WITHOUT_COUNT:
        if environment.get(name):
            raise ValueError(f'{name}={environment[name]} tells of several processes, but not of how many; '
                             f'{REMEDY}, or unset {name} for a single process')
