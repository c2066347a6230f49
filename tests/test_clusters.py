"""How a process finds its place among others from the environment variables of its launcher."""

import pytest

from lct import clusters
from lct.clusters import Place

EXPLICIT = {'JAX_COORDINATOR_ADDRESS': 'here:1', 'JAX_NUM_PROCESSES': '4', 'JAX_PROCESS_ID': '3'}
SLURM = {'SLURM_JOB_ID': '7', 'SLURM_STEP_NODELIST': 'n[01-02],m3', 'SLURM_NTASKS': '16',
         'SLURM_PROCID': '3', 'SLURM_LOCALID': '3', 'SLURM_STEP_TASKS_PER_NODE': '8(x2)',
         'SLURM_STEP_ID': '2'}
TWO_PER_HOST = {'SLURM_NTASKS': '4', 'SLURM_LOCALID': '1', 'SLURM_STEP_TASKS_PER_NODE': '2(x2)'}
EIGHT_GPUS = {'SLURM_GPUS_ON_NODE': '8', 'CUDA_VISIBLE_DEVICES': '0,1,2,3,4,5,6,7'}
TORCHRUN = {'WORLD_SIZE': '16', 'RANK': '9', 'LOCAL_RANK': '1', 'LOCAL_WORLD_SIZE': '8',
            'MASTER_ADDR': 'n01', 'MASTER_PORT': '29500'}
OPEN_MPI = {'OMPI_COMM_WORLD_SIZE': '4', 'OMPI_COMM_WORLD_RANK': '3', 'OMPI_COMM_WORLD_LOCAL_RANK': '1',
            'OMPI_COMM_WORLD_LOCAL_SIZE': '2'}
OPEN_MPI_4 = {**OPEN_MPI, 'OMPI_MCA_orte_hnp_uri': '1531576320.0;tcp://10.96.0.1,10.148.0.1:34911'}
OPEN_MPI_5 = {**OPEN_MPI, 'PMIX_NAMESPACE': 'prterun-login-1-node-77@1', 'PMIX_RANK': '3'}
MPICH = {'PMI_SIZE': '2', 'PMI_RANK': '1', 'MPI_LOCALRANKID': '1', 'MPI_LOCALNRANKS': '2'}
PALS = {'PMI_SIZE': '8', 'PMI_RANK': '5', 'PALS_RANKID': '5', 'PALS_LOCAL_RANKID': '1',
        'PALS_LOCAL_SIZE': '4', 'JAX_COORDINATOR_ADDRESS': 'x1:8476'}


def without(environment, *names):
    return {name: value for name, value in environment.items() if name not in names}


@pytest.mark.parametrize(('environment', 'expected'), [
    (EXPLICIT, Place('JAX_NUM_PROCESSES', 4, 3, 'here:1')),
    ({**SLURM, **TORCHRUN, **EXPLICIT}, Place('JAX_NUM_PROCESSES', 4, 3, 'here:1')),
    (SLURM, Place('SLURM', 16, 3, 'n01:61449', (3,))),
    ({**SLURM, 'SLURM_NTASKS': '2', 'SLURM_PROCID': '1', 'SLURM_STEP_TASKS_PER_NODE': '1(x2)'},
     Place('SLURM', 2, 1, 'n01:61449')),
    ({**SLURM, 'CUDA_VISIBLE_DEVICES': '5'}, Place('SLURM', 16, 3, 'n01:61449')),  # bound by srun
    ({**SLURM, **TWO_PER_HOST, **EIGHT_GPUS}, Place('SLURM', 4, 3, 'n01:61449', (4, 5, 6, 7))),
    ({**SLURM, **TWO_PER_HOST, 'SLURM_GPUS_ON_NODE': '8'}, Place('SLURM', 4, 3, 'n01:61449', (4, 5, 6, 7))),
    ({**SLURM, **TWO_PER_HOST, 'CUDA_VISIBLE_DEVICES': '0,1,2,3', 'SLURM_GPUS_ON_NODE': '8'},
     Place('SLURM', 4, 3, 'n01:61449')),  # srun --gpus-per-task=4: each task sees its own
    ({**SLURM, **EIGHT_GPUS}, Place('SLURM', 16, 3, 'n01:61449', (3,))),
    ({**TORCHRUN, 'CUDA_VISIBLE_DEVICES': '0,1,2,3,4,5,6,7', 'LOCAL_WORLD_SIZE': '4'},
     Place('torchrun', 16, 9, 'n01:29501', (2, 3))),
    ({**SLURM, 'JAX_COORDINATOR_PORT': '9'}, Place('SLURM', 16, 3, 'n01:9', (3,))),
    ({**SLURM, 'PMI_SIZE': '16', 'PMI_RANK': '3'}, Place('SLURM', 16, 3, 'n01:61449', (3,))),
    ({**SLURM, 'PMI_SIZE': '32', 'PMI_RANK': '30', 'SLURM_JOB_NODELIST': 'n01'},  # mpiexec in a SLURM job
     Place('MPICH', 32, 30, 'n01:61449')),
    (TORCHRUN, Place('torchrun', 16, 9, 'n01:29501', (1,))),
    ({**SLURM, **TORCHRUN}, Place('torchrun', 16, 9, 'n01:29501', (1,))),
    ({**TORCHRUN, 'MASTER_ADDR': 'fe80::1'}, Place('torchrun', 16, 9, '[fe80::1]:29501', (1,))),
    (OPEN_MPI_4, Place('Open MPI', 4, 3, '10.96.0.1:64591', (1,))),
    (OPEN_MPI_5, Place('Open MPI', 4, 3, 'login-1-node:62187', (1,))),
    ({**OPEN_MPI, 'PMIX_NAMESPACE': 'prte-n01-77@3'}, Place('Open MPI', 4, 3, 'n01:64420', (1,))),
    ({**SLURM, 'PMIX_NAMESPACE': 'slurm.pmix.7.2', 'PMIX_RANK': '3'},  # srun --mpi=pmix
     Place('SLURM', 16, 3, 'n01:61449', (3,))),
    ({**SLURM, **OPEN_MPI_5}, Place('Open MPI', 4, 3, 'login-1-node:61449', (1,))),
    ({**OPEN_MPI, 'MASTER_ADDR': 'a', 'MASTER_PORT': '5'}, Place('Open MPI', 4, 3, 'a:5', (1,))),
    (MPICH, Place('MPICH', 2, 1, '127.0.0.1:61440', (1,))),
    (PALS, Place('MPICH', 8, 5, 'x1:8476', (1,))),
    ({'TPU_WORKER_HOSTNAMES': 'a,b'}, Place('jax', None, None, '')),
    ({'LCT_CLUSTER': 'auto'}, Place('jax', None, None, '')),
])
def test_the_place_among_several(environment, expected):
    assert clusters.find(environment) == expected


@pytest.mark.parametrize('environment', [
    {},
    {'JAX_COORDINATOR_ADDRESS': 'here:1'},
    {**EXPLICIT, 'JAX_NUM_PROCESSES': '1', 'JAX_PROCESS_ID': '0'},
    without(SLURM, 'SLURM_STEP_NODELIST'),  # the batch script, outside of srun
    {**SLURM, 'SLURM_NTASKS': '1', 'SLURM_PROCID': '0', 'PMIX_RANK': '0'},
    {**TORCHRUN, 'WORLD_SIZE': '1', 'RANK': '0'},
    {**OPEN_MPI_5, 'OMPI_COMM_WORLD_SIZE': '1', 'OMPI_COMM_WORLD_RANK': '0'},
    {'WORLD_SIZE': '1'},
    {'TPU_WORKER_HOSTNAMES': 'localhost'},
])
def test_a_single_process(environment):
    assert clusters.find(environment) is None


@pytest.mark.parametrize(('environment', 'message'), [
    ({**EXPLICIT, 'JAX_PROCESS_ID': '4'}, 'JAX_PROCESS_ID=4 of JAX_NUM_PROCESSES=4 must be'),
    ({**EXPLICIT, 'JAX_COORDINATOR_ADDRESS': ''}, 'set without JAX_COORDINATOR_ADDRESS'),
    ({**EXPLICIT, 'JAX_COORDINATOR_ADDRESS': 'here'}, 'JAX_COORDINATOR_ADDRESS=here must be host:port'),
    ({**TORCHRUN, 'RANK': '16'}, 'RANK=16 must be below WORLD_SIZE=16'),
    (without(TORCHRUN, 'RANK'), 'WORLD_SIZE=16 tells of several processes, but RANK does not'),
    (without(TORCHRUN, 'MASTER_ADDR'), r'WORLD_SIZE=16 \(torchrun\) but the host of process 0 is not known'),
    (OPEN_MPI, r'OMPI_COMM_WORLD_SIZE=4 \(Open MPI\) but the host of process 0 is not known'),
    ({**MPICH, 'MPI_LOCALNRANKS': '1'}, 'set JAX_COORDINATOR_ADDRESS to host:port of process 0'),
    ({**SLURM, **EIGHT_GPUS, 'SLURM_STEP_TASKS_PER_NODE': '3(x2)'},
     '8 GPUs of this host cannot be shared evenly by its 3 processes; start one process per GPU or one per'),
    (without(OPEN_MPI_5, *OPEN_MPI), 'PMIX_RANK=3 tells of several processes'),  # prterun alone
    ({'FLUX_JOB_SIZE': '4', 'PMI_SIZE': '4', 'PMI_RANK': '1'}, 'set JAX_COORDINATOR_ADDRESS to host:port'),
    ({'ALPS_APP_PE': '0'}, 'ALPS_APP_PE=0 tells of several processes'),
    ({'PMIX_RANK': '0'}, 'PMIX_RANK=0 tells of several processes, but not of how many'),
])
def test_what_cannot_be_joined_is_refused_instead_of_run_alone(environment, message):
    with pytest.raises(ValueError, match=message):
        clusters.find(environment)


def test_the_first_host_of_a_node_file(tmp_path):
    path = tmp_path / 'nodes'
    path.write_text('x3001\nx3002\n')
    environment = {**MPICH, 'MPI_LOCALNRANKS': '1', 'PBS_NODEFILE': str(path), 'JAX_COORDINATOR_PORT': '5'}
    place = clusters.find(environment)
    assert place == Place('MPICH', 2, 1, 'x3001:5')
