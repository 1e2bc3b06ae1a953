#!/usr/bin/env bash
# The published FID of PFGM++ and EDM: train, score every late snapshot on 3 x 50 000 images, best of the snapshots.
# usage: fid.sh cifar10|cifar10-cond|ffhq64 D|inf [ref|train|score ...] [--dry-run]    (no step: all of them)
# GPUS: processes (8); ARCH: ddpmpp or ncsnpp of CIFAR-10 (ncsnpp); DATA: data set; RUNS: where runs go; REF: reference file;
# METRICS: features of the distance (fid, with which alone it is the published FID);
# FROM: first snapshot to score, kimg; NUM: images per block (50000);
# TRAIN, SCORE: further options of training and scoring, such as TRAIN="--duration=64Ki --snapshot=32Ki"
set -euo pipefail
cd "$(dirname "$0")/../.."
source bash_files/common.sh
usage() { sed -n 3p "$called" | cut -c3- >&2; exit 2; }
[ ${#args[@]} -ge 2 ] || usage
case "${args[0]}" in
  cifar10) preset=pfgmpp-cifar10-${ARCH:-ncsnpp} data=${DATA:-datasets/cifar10-32x32.zip} steps=18 from=${FROM:-100000} ;;
  cifar10-cond) preset=pfgmpp-cifar10-${ARCH:-ncsnpp}-cond data=${DATA:-datasets/cifar10-32x32.zip} steps=18 from=${FROM:-100000} ;;
  ffhq64) preset=pfgmpp-ffhq64-ddpmpp data=${DATA:-datasets/ffhq-64x64.zip} steps=40 from=${FROM:-150000} ;;
  *) usage ;;
esac
D=${args[1]}
stages=" ${args[*]:2} "
metrics=${METRICS:-fid}
folder=${RUNS:-training-runs}/$preset-D$D
ref=${REF:-$folder-reference.npz}
wanted() { [[ "$stages" == "  " || "$stages" == *" $1 "* ]]; }

if wanted ref && [ ! -e "$ref" ]; then # first: what it lacks, such as weights, shows before training
  launch calculate_metrics.py ref --data="$data" --dest="$ref" --metrics="$metrics"
fi
if wanted train; then # snapshots every 2.6 million images, as published
  # shellcheck disable=SC2086 # words of one's own
  launch train_edm2.py --outdir="$folder" --data="$data" --preset="$preset" --aug-dim="$D" --snapshot=2560Ki ${TRAIN:-}
fi
if wanted score; then # minimum, and mean of the three best snapshots; finished scores are kept
  # shellcheck disable=SC2086 # words of one's own
  launch calculate_metrics.py gen --net="$folder/network-snapshot-*-ema.safetensors" --min-kimg="$from" --blocks=3 \
    --num-images="${NUM:-50000}" --ref="$ref" --metrics="$metrics" --distances=fd --aug-dim="$D" --steps=$steps ${SCORE:-}
fi
