#!/usr/bin/env bash
# The published FID of PFGM++ and EDM: train, 3 x 50 000 images of every late snapshot, score, best of the snapshots.
# usage: fid.sh cifar10|cifar10-cond|ffhq64 D|inf [train|generate|score|best ...] [--dry-run]    (no step: all of them)
# GPUS: processes (8); ARCH: ddpmpp or ncsnpp of CIFAR-10 (ncsnpp); DATA: data set; RUNS: where runs and images go;
# FROM: first snapshot to score, kimg; NUM: images per block (50000); DETECTOR: features of the distance (Inception "fid" for published numbers)
set -euo pipefail
cd "$(dirname "$0")/../.."
args=()
for a in "$@"; do if [ "$a" = --dry-run ]; then DRY_RUN=1; else args+=("$a"); fi; done
usage() { sed -n 3p "$0" | cut -c3- >&2; exit 2; }
[ ${#args[@]} -ge 2 ] || usage
case "${args[0]}" in
  cifar10) preset=pfgmpp-cifar10-${ARCH:-ncsnpp} data=${DATA:-datasets/cifar10-32x32.zip} steps=18 from=${FROM:-100000} ;;
  cifar10-cond) preset=pfgmpp-cifar10-${ARCH:-ncsnpp}-cond data=${DATA:-datasets/cifar10-32x32.zip} steps=18 from=${FROM:-100000} ;;
  ffhq64) preset=pfgmpp-ffhq64-ddpmpp data=${DATA:-datasets/ffhq-64x64.zip} steps=40 from=${FROM:-150000} ;;
  *) usage ;;
esac
D=${args[1]}
stages=" ${args[*]:2} "
gpus=${GPUS:-8}
detector=${DETECTOR:-pixel}
num=${NUM:-50000}
folder=${RUNS:-training-runs}/$preset-D$D
ref=${REF:-$folder/reference.npz}

run() { # print the command; run it unless --dry-run was given
  echo "+ $*"
  if [ -z "${DRY_RUN:-}" ]; then "$@"; fi
}
wanted() { [[ "$stages" == "  " || "$stages" == *" $1 "* ]]; }
launch() { run torchrun --standalone --nproc_per_node="$gpus" "$@"; }

snapshots() { # those from `from` kimg on
  local file kimg found=0
  for file in "$folder"/network-snapshot-*-ema.safetensors; do
    [ -e "$file" ] || continue
    kimg=$(basename "$file" | cut -d- -f3)
    if [ "$((10#$kimg))" -ge "$from" ]; then echo "$kimg"; found=1; fi
  done
  if [ $found = 1 ]; then return; fi
  if [ -n "${DRY_RUN:-}" ]; then printf '%07d\n' "$from"; return; fi
  echo "$folder holds no snapshot from $from kimg on: train first, or give FROM (kimg)" >&2
  return 2
}

if wanted train; then # snapshots every 2.6 million images, as published
  launch train_edm2.py --outdir="$folder" --data="$data" --preset="$preset" --aug-dim="$D" --snapshot=2560Ki
fi
if wanted generate; then
  kimgs=$(snapshots)
  for kimg in $kimgs; do
    for first in 0 $num $((2 * num)); do
      launch generate_images.py --net="$folder/network-snapshot-$kimg-ema.safetensors" --aug-dim="$D" --steps=$steps \
        --seeds="$first-$((first + num - 1))" --subdirs --batch=64 --outdir="$folder/images/$kimg-$first"
    done
  done
fi
if wanted score; then
  kimgs=$(snapshots)
  if [ ! -e "$ref" ]; then launch calculate_metrics.py ref --data="$data" --dest="$ref" --metrics="$detector"; fi
  for kimg in $kimgs; do
    for first in 0 $num $((2 * num)); do
      launch calculate_metrics.py calc --images="$folder/images/$kimg-$first" --ref="$ref" --num-images=$num \
        --metrics="$detector" --distances=fd --dest="$folder/scores/$kimg-$first.json" \
        --tag=checkpoint="$kimg" --tag=sampling="$first"
    done
  done
fi
if wanted best; then # minimum, and mean of the three best snapshots
  run python calculate_metrics.py best --scores="$folder/scores/*.json"
fi
