#!/bin/bash
# Train on a SLURM cluster: sbatch experiments/launchers/slurm.sh
# One process per GPU; the mesh has as many devices as there are tasks. What follows the script's name goes to
# extend.py: --set model_folder=... --set corpus=...
#SBATCH --job-name=lct
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
# Ten minutes before the end every process is told to stop: it finishes its step, saves and ends with status 130.
# Make this longer than two steps and a checkpoint take.
#SBATCH --signal=TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

WORKDIR=${WORKDIR:-runs/8b}  # on a file system that all nodes share
CONFIG=${CONFIG:-experiments/configs/published/gradient_llama3_8b.py}
MESH=${MESH:-1,1,$((SLURM_JOB_NUM_NODES * SLURM_NTASKS_PER_NODE)),1}  # data,fsdp,sequence,tensor

# so that transfers run beside the computation
export XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_latency_hiding_scheduler=true --xla_gpu_experimental_parallel_collective_overlap_limit=8"
unset http_proxy https_proxy HTTP_PROXY HTTPS_PROXY  # the processes talk to each other, not to a proxy

# --gpu-bind=none: every task sees all GPUs of its node and takes the one of its own number
run() { srun --kill-on-bad-exit=1 --gpu-bind=none --cpus-per-task="$SLURM_CPUS_PER_TASK" python -u "$@"; }

run experiments/doctor.py --workdir "$WORKDIR"
status=0
run experiments/extend.py --config "$CONFIG" --workdir "$WORKDIR" --mesh "$MESH" "$@" || status=$?
case "$status" in
130) scontrol requeue "$SLURM_JOB_ID" ;;  # stopped and saved: go on where it stood
75 | 76) [ "${SLURM_RESTART_COUNT:-0}" -ge 5 ] || scontrol requeue "$SLURM_JOB_ID" ;;  # stuck, or a lost node
esac
exit "$status"
