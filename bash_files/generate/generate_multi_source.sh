#!/usr/bin/env bash
# 5000 images per class from one snapshot, five sampling blocks, as the multi-source experiments report them.
# usage: generate_multi_source.sh sim1|sim2|sim3 SNAPSHOT OUTDIR [K: 10] [--dry-run]    (GPUS: processes, default 8)
# VAE: local folder of the autoencoder, or its name on the hub
set -euo pipefail
cd "$(dirname "$0")/../.."
source bash_files/convert/sources.sh
sim=${args[0]:?usage: generate_multi_source.sh SIM SNAPSHOT OUTDIR [K] [--dry-run]}
net=${args[1]:?usage: generate_multi_source.sh SIM SNAPSHOT OUTDIR [K] [--dry-run]}
out=${args[2]:?usage: generate_multi_source.sh SIM SNAPSHOT OUTDIR [K] [--dry-run]}
classes=$(classes_of "$sim" | cut -d, -f"1-${args[3]:-10}")
for block in 0 1 2 3 4; do
  for class in ${classes//,/ }; do
    launch generate_images.py --net="$net" \
      --outdir="$out/$class-$block" --seeds="$((block * 5000))+5000" --class="$class" --subdirs \
      ${VAE:+--vae="$VAE"}
  done
done
