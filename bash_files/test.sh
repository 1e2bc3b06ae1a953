#!/usr/bin/env bash
# All tests, set-up included. Options: --slow adds the long ones; anything else goes to pytest.
source "$(dirname "$0")/setup.sh"
marks="not slow"
args=()
for arg in "$@"; do
  if [ "$arg" = "--slow" ]; then marks=""; else args+=("$arg"); fi
done
# Small tensors: two processes with one thread each beat one process with two. (nproc counts OMP_NUM_THREADS as the cores.)
jobs="${TEST_JOBS:-$(env -u OMP_NUM_THREADS nproc)}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec python -m pytest -m "$marks" -n "$jobs" "${args[@]}"
