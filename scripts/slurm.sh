#!/usr/bin/env bash
# sbatch --nodes=3 --ntasks-per-node=2 --gpus-per-node=2 scripts/slurm.sh --config configs/pretrain.yaml [key=value ...]
# One process for each GPU of every node, started by Slurm itself: no launcher stands between, so the trainer's exit code is
# the job's. Before the time is over (or at a preemption) every process gets SIGTERM, the stage saves and leaves with 85, and
# the job is put back into the queue; the same command goes on. As an array with one task at a time
# (sbatch --array=1-5%1 ...) it asks for more time again without a requeue: a finished stage ends at once with 0.
# PYTHON and MASTER_PORT may be set; submit from the project's folder, on a disk that all nodes see.
#SBATCH --job-name=anix
#SBATCH --cpus-per-task=8
#SBATCH --requeue
#SBATCH --signal=TERM@300
#SBATCH --open-mode=append
set -euo pipefail

stopped=85 # train/base/errors.py: saved, the same command goes on
[ $# -gt 0 ] || { echo "usage: sbatch ... scripts/slurm.sh --config STAGE.yaml [key=value ...]" >&2; exit 2; }
hosts="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
MASTER_ADDR="${hosts%%$'\n'*}"
export MASTER_ADDR MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}" PYTHON="${PYTHON:-.venv/bin/python}"

trap : TERM # the processes are told too; this shell waits for what they say
code=0
# shellcheck disable=SC2016 # the variables are those of each process
srun --kill-on-bad-exit=0 bash -c '
  export RANK="$SLURM_PROCID" WORLD_SIZE="$SLURM_NTASKS" LOCAL_RANK="$SLURM_LOCALID"
  export LOCAL_WORLD_SIZE="$((SLURM_NTASKS / SLURM_NNODES))"
  exec "$PYTHON" train/run.py "$@"' trainer "$@" || code=$?

if [ "$code" -eq "$stopped" ] && [ -z "${SLURM_ARRAY_TASK_ID:-}" ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
