#!/usr/bin/env bash
# Scores of 2000 images, ten per class, with and without autoguidance by the reference, as published.
# usage: evaluate.sh SNAPSHOT OUTDIR [guidance weight: 2.2] [--dry-run]    (GPUS: processes, default 2)
# METRICS: detectors, such as fid,fd_dinov2,swin_l (default: those of the reference file); GUIDE: the guiding snapshot;
# NUM: images (2000); SCORE: further options, such as SCORE="--weights=fid=FILE"
set -euo pipefail
cd "$(dirname "$0")/../.."
source bash_files/ajest/common.sh
net=${args[0]:?usage: evaluate.sh SNAPSHOT OUTDIR [WEIGHT] [--dry-run]}
out=${args[1]:?usage: evaluate.sh SNAPSHOT OUTDIR [WEIGHT] [--dry-run]}
guide=${GUIDE:-$runs/reference/network-snapshot-0010567-0.100.safetensors}
for weight in 1 "${args[2]:-2.2}"; do
  guided=(); if [ "$weight" != 1 ]; then guided=(--gnet="$guide" --guidance="$weight"); fi
  # shellcheck disable=SC2086 # words of one's own
  launch calculate_metrics.py gen --net="$net" ${guided[@]+"${guided[@]}"} --class=balanced --num-images="${NUM:-2000}" --ref="$ref" \
    ${METRICS:+--metrics="$METRICS"} --dest="$out/w$weight.json" --tag=guidance="$weight" ${SCORE:-}
done
