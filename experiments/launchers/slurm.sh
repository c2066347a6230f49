#!/bin/bash
# Train on a SLURM cluster: sbatch experiments/launchers/slurm.sh --config runs/8b.py --workdir runs/8b
# What follows the script's name goes to extend.py. The meshes are the config's and must hold all GPUs of the job:
# `plan.py --devices 32 --output runs/8b.py` writes such a config, and `--mesh auto` makes one ring of any number.
# One process per GPU; --ntasks-per-node=1 --cpus-per-task=96 starts one per node with all its GPUs.
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

# so that transfers run beside the computation
export XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_latency_hiding_scheduler=true --xla_gpu_experimental_parallel_collective_overlap_limit=8"
unset http_proxy https_proxy HTTP_PROXY HTTPS_PROXY  # the processes talk to each other, not to a proxy

# --gpu-bind=none: every task sees all GPUs of its node and takes the one of its own number
run() { srun --kill-on-bad-exit=1 --gpu-bind=none --cpus-per-task="$SLURM_CPUS_PER_TASK" python -u "$@"; }

run experiments/doctor.py
status=0
run experiments/extend.py "$@" || status=$?
case "$status" in
130) scontrol requeue "$SLURM_JOB_ID" ;;  # stopped and saved: go on where it stood
75 | 76) [ "${SLURM_RESTART_COUNT:-0}" -ge 5 ] || scontrol requeue "$SLURM_JOB_ID" ;;  # stuck, or a lost node
esac
exit "$status"
