#!/bin/bash
# Distils on two machines of eight GPUs each under SLURM: sbatch examples/slurm.sh --teacher edm2-s --mode sida
# Expect: an oid at the end of slurm-JOB.out. Ten minutes before its time is over, or when it is preempted, the job
# writes a checkpoint and queues itself again; it then goes on from there.
# The run directory ($SIDACTL_RUN, or ./sida-run) must be on a disk that all machines see.
#SBATCH --job-name=sidactl
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@600
set -euo pipefail

first_machine=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

again() {
    kill -TERM "$work" # every process ends the pass it is in, writes a checkpoint and stops
    wait "$work" || true
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
trap again TERM

export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=540 # seconds for that before torchrun kills them, by default 30

srun torchrun \
    --nnodes "$SLURM_NNODES" \
    --nproc-per-node "$SLURM_GPUS_ON_NODE" \
    --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$first_machine:${PORT:-29500}" \
    -m -- sidactl distill "$@" &
work=$!
wait "$work"
