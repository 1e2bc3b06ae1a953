#!/usr/bin/env bash
# 2000 images, ten per class, with and without autoguidance by the reference, and their scores, as published.
# usage: evaluate.sh SNAPSHOT OUTDIR [guidance weight: 2.2] [--dry-run]    (GPUS: processes, default 2)
set -euo pipefail
cd "$(dirname "$0")/../.."
source bash_files/ajest/common.sh
net=${args[0]:?usage: evaluate.sh SNAPSHOT OUTDIR [WEIGHT] [--dry-run]}
out=${args[1]:?usage: evaluate.sh SNAPSHOT OUTDIR [WEIGHT] [--dry-run]}
guide="$runs/reference/network-snapshot-0010567-0.100.safetensors"
for weight in 1 "${args[2]:-2.2}"; do
  run torchrun --standalone --nproc_per_node="$gpus" generate_images.py --net="$net" --gnet="$guide" --guidance="$weight" \
    --outdir="$out/w$weight" --seeds=0-1999 --class=balanced
  run python calculate_metrics.py calc --images="$out/w$weight" --ref=dataset-refs/tiny.npz --dest="$out/w$weight.json"
done
