#!/usr/bin/env bash
# One 256x256 zip and one latent zip per class of a similarity level, and reference statistics of each class.
# usage: convert_1c.sh sim1|sim2|sim3 [images per class: 1000] [--dry-run]    (IMAGENET: folder with the 1000 class folders)
# CLASSES: others than those of the level; DATASETS, REFS: where data and statistics go; METRICS: detectors of the
# statistics; VAE: local folder of the autoencoder
set -euo pipefail
cd "$(dirname "$0")/../.."
source bash_files/convert/sources.sh
sim=${args[0]:?usage: convert_1c.sh sim1|sim2|sim3 [images per class] [--dry-run]}
nums=${args[1]:-1000}
classes=${CLASSES:-$(classes_of "$sim")}
for class in ${classes//,/ }; do
  name=inet-256-$class-$nums
  run python dataset_tool.py convert --source="${IMAGENET:-downloads/imagenet/train}" --sources="$class" \
    --per-source="$nums" --dest="$datasets/ori_datasets/$sim/$name.zip" --resolution=256x256 --transform=center-crop-dhariwal
  run python dataset_tool.py encode --source="$datasets/ori_datasets/$sim/$name.zip" \
    --dest="$datasets/latent_datasets/$sim/$name.zip" ${VAE:+--vae="$VAE"}
  run python calculate_metrics.py ref --data="$datasets/ori_datasets/$sim/$name.zip" \
    --dest="${REFS:-dataset-refs}/$sim/$name.npz" ${METRICS:+--metrics="$METRICS"}
done
