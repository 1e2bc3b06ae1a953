#!/usr/bin/env bash
# The zip of the first K classes of a similarity level: the same images as convert_1c.sh makes one class at a time.
# usage: convert_10c.sh sim1|sim2|sim3 [images per class: 1000] [K: 10] [--dry-run]
set -euo pipefail
cd "$(dirname "$0")/../.."
source bash_files/convert/sources.sh
sim=${args[0]:?usage: convert_10c.sh sim1|sim2|sim3 [images per class] [K] [--dry-run]}
nums=${args[1]:-1000}
k=${args[2]:-10}
classes=$(classes_of "$sim" | cut -d, -f"1-$k")
name=inet-256-${k}c-$nums
run python dataset_tool.py convert --source="${IMAGENET:-downloads/imagenet/train}" --sources="$classes" \
  --per-source="$nums" --dest="$datasets/ori_datasets/$sim/$name.zip" --resolution=256x256 --transform=center-crop-dhariwal
run python dataset_tool.py encode --source="$datasets/ori_datasets/$sim/$name.zip" \
  --dest="$datasets/latent_datasets/$sim/$name.zip" ${VAE:+--vae="$VAE"}
