#!/usr/bin/env bash
# The learner: EDM2-XS on Tiny ImageNet with one kind of selection, about as long as the published runs (48 hours of 2 GPUs).
# usage: train_learner.sh baseline|random|ajest|early|late|diverse [--dry-run]    (GPUS: processes, default 2)
set -euo pipefail
cd "$(dirname "$0")/../.."
source bash_files/ajest/common.sh
arm=${args[0]:?usage: train_learner.sh baseline|random|ajest|early|late|diverse [--dry-run]}
# score-scale: published scores are sums over 3x64x64 values divided by the 1024 images of a GPU.
chosen=(--batch=384 --filter-ratio=0.8125 --score-scale=12 --lr-schedule=ajest "${periods[@]}" --duration=6912Ki)
reference=(--reference="$runs/reference/network-snapshot-0010567-0.100.safetensors")
case "$arm" in
  baseline) options=(--batch=2048 --duration=44Mi --status=512Ki --snapshot=4Mi --checkpoint=4Mi) ;;
  random) options=(--select=random "${chosen[@]}") ;;
  ajest) options=(--select=jest --chunks=8 "${reference[@]}" "${chosen[@]}") ;;
  early) options=(--select=jest --chunks=8 --select-when=early "${reference[@]}" "${chosen[@]}") ;;
  late) options=(--select=jest --chunks=8 --select-when=late "${reference[@]}" "${chosen[@]}") ;;
  diverse) options=(--select=diverse --chunks=8 "${reference[@]}" "${chosen[@]}") ;;
  *) echo "Error: '$arm' is no arm: give baseline, random, ajest, early, late or diverse" >&2; exit 2 ;;
esac
launch train_edm2.py --outdir="$runs/$arm" --data="$tiny" \
  --preset=edm2-tiny-xs --batch-gpu=128 "${options[@]}"
