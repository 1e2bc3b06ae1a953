#!/usr/bin/env bash
# Sourced by the scripts in the folders beside it, after `cd` to the root: their words without --dry-run are in `args`.
# GPUS: processes (gpus, where a script has no default of its own: 8).
source bash_files/help.sh
args=()
for a in "$@"; do if [ "$a" = --dry-run ]; then DRY_RUN=1; else args+=("$a"); fi; done
gpus=${GPUS:-${gpus:-8}}
run() { # print the command; run it unless --dry-run was given
  echo "+ $*"
  if [ -z "${DRY_RUN:-}" ]; then "$@"; fi
}
launch() { # run a script on all GPUs
  if [ "$gpus" = 1 ]; then run python "$@"; else run torchrun --standalone --nproc_per_node="$gpus" "$@"; fi
}
