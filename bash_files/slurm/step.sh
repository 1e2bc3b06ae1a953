#!/usr/bin/env bash
# One step of an experiment as a task of a job array: step FIRST + task of the file. experiment.sh submits these.
# usage: FIRST=N sbatch --array=0-3 bash_files/slurm/step.sh FILE [OPTIONS of run_experiment.py]
# Told to stop, a training writes a checkpoint, and its task goes back into the queue.

#SBATCH --job-name=step
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120

set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/../..}"
source bash_files/help.sh
source bash_files/slurm/job.sh
job python run_experiment.py "$@" --index="$((${FIRST:-0} + SLURM_ARRAY_TASK_ID))" --jobs=1
