#!/usr/bin/env bash
# An experiment as job arrays of SLURM, one for every entry of its file, each waiting for those that it needs.
# usage: experiment.sh FILE [OPTIONS of run_experiment.py] [-- OPTIONS of sbatch]
#   bash bash_files/slurm/experiment.sh experiments/imagenet.yaml --budget=full -- --gpus=1 --time=24:00:00 --partition=gpu
#   bash bash_files/slurm/experiment.sh experiments/imagenet.yaml --set 'launch=torchrun --standalone --nproc_per_node=8' \
#       -- --nodes=1 --gpus=8
# What is done already is left out, so submit again after a failure. A step that is preempted goes back into the queue, and on
# from its checkpoint. LIMIT: tasks of an array that run at a time; SBATCH_ACCOUNT and others are sbatch's own
set -euo pipefail
cd "$(dirname "$0")/../.."
source bash_files/help.sh
words=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do words+=("$1"); shift; done
if [ ${#words[*]} = 0 ]; then echo "Error: which experiment? Give a file, such as experiments/imagenet.yaml" >&2; exit 2; fi
if [ $# -gt 0 ]; then shift; fi # what is left is sbatch's
arrays=$(python run_experiment.py "${words[@]}" --with-needs --arrays)
ids=()
while read -r first tasks after; do
  if [ -z "$first" ]; then continue; fi
  others=""
  if [ "$after" != - ]; then
    for number in ${after//,/ }; do others+=":${ids[$number]}"; done
  fi
  id=$(FIRST=$first sbatch --parsable --array="$tasks${LIMIT:+%$LIMIT}" --export=ALL \
    ${others:+--dependency="afterok$others" --kill-on-invalid-dep=yes} "$@" bash_files/slurm/step.sh "${words[@]}")
  id=${id%%;*}
  ids+=("$id")
  echo "$id: steps $first + $tasks${others:+, after${others//:/ }}"
done <<< "$arrays"
