#!/usr/bin/env bash
# One training on one node or many: torchrun on each, which meet at the first (c10d rendezvous).
# usage: sbatch [OPTIONS of sbatch] bash_files/slurm/train.sh OPTIONS of train_edm2.py
#   sbatch --nodes=1 --gpus-per-node=8 bash_files/slurm/train.sh --outdir=runs/a --data=a.zip --preset=edm2-img64-s
#   sbatch --nodes=4 --gpus-per-node=8 bash_files/slurm/train.sh --outdir=runs/b --data=b.zip --preset=edm2-img512-xl
# Told to stop (preemption, end of its time), it writes a checkpoint and goes back into the queue. GPUS: processes per node (the
# GPUs that SLURM gives, else 1); PORT: of the rendezvous (from the number of the job)

#SBATCH --job-name=train
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300

set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/../..}"
source bash_files/help.sh
source bash_files/slurm/job.sh
gpus=${GPUS:-${SLURM_GPUS_ON_NODE:-1}}
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
first=${hosts%%$'\n'*} # no `| head`, which ends the list's writer by a signal, and with it the job
port=${PORT:-$((20000 + SLURM_JOB_ID % 20000))}
job srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 python -m dnnlib.launch --nnodes="$SLURM_NNODES" \
  --nproc_per_node="$gpus" --rdzv_id="$SLURM_JOB_ID" --rdzv_backend=c10d --rdzv_endpoint="$first:$port" train_edm2.py "$@"
