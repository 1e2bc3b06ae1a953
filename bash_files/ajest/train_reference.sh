#!/usr/bin/env bash
# The reference network: EDM2-XXS on Tiny ImageNet, 5160 steps of 2048 images (10.6 million), as published.
# usage: train_reference.sh [--dry-run]    (GPUS: processes, default 2)
set -euo pipefail
cd "$(dirname "$0")/../.."
source bash_files/ajest/common.sh
launch train_edm2.py --outdir="$runs/reference" --data="$tiny" \
  --preset=edm2-tiny-xxs --batch-gpu=256 --duration=10320Ki --status=240Ki --snapshot=1032Ki --checkpoint=2064Ki
