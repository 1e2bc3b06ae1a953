# Sourced by the scripts beside it. GPUS: processes (default 2); RUNS: where runs go; TINY: the data set.
gpus=${GPUS:-2}
runs=${RUNS:-training-runs/ajest}
tiny=${TINY:-datasets/tiny-imagenet.zip}
args=()
for a in "$@"; do if [ "$a" = --dry-run ]; then DRY_RUN=1; else args+=("$a"); fi; done
run() { # print the command; run it unless --dry-run was given
  echo "+ $*"
  if [ -z "${DRY_RUN:-}" ]; then "$@"; fi
}
# A step trains on 2048 images (reference, baseline), or on 384 chosen from 2048 candidates (f = 13/16: what chunks of
# 3 of 128 in the published code keep). Snapshots every 500 steps of 2048 in multiples of both batch sizes.
periods=(--status=384Ki --snapshot=3072Ki --checkpoint=6144Ki)
