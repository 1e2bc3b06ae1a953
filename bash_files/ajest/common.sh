#!/usr/bin/env bash
# shellcheck disable=SC2034 # for them
# Sourced by the scripts beside it. GPUS: processes (default 2); RUNS: where runs go; TINY: the data set; REF: its statistics.
gpus=2
source bash_files/common.sh
runs=${RUNS:-training-runs/ajest}
tiny=${TINY:-datasets/tiny-imagenet.zip}
ref=${REF:-dataset-refs/tiny.npz}
# A step trains on 2048 images (reference, baseline), or on 384 chosen from 2048 candidates (f = 13/16: what chunks of
# 3 of 128 in the published code keep). Snapshots every 500 steps of 2048 in multiples of both batch sizes.
periods=(--status=384Ki --snapshot=3072Ki --checkpoint=6144Ki)
