#!/usr/bin/env bash
# Sourced by the batch scripts beside it: `job COMMAND ...` runs a command that ends with 75 after it was told to stop and wrote
# its checkpoint (run_experiment.py, train_edm2.py, dnnlib/launch.py); the job then goes back into the queue.
job() {
  "$@" &
  local pid=$! code=0
  trap 'kill -TERM "$pid" 2> /dev/null || true' USR1 TERM # before preemption (--signal) and at its start
  wait "$pid" || code=$?
  while kill -0 "$pid" 2> /dev/null; do # a signal ends `wait`, not the command
    code=0
    wait "$pid" || code=$?
  done
  if [ "$code" = 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
  exit "$code"
}
