#!/usr/bin/env bash
# Train one setup of the multi-source experiments; 1c-... trains the ten single-source models in turn.
# usage: train_multi_source.sh sim1|sim2|sim3 <1c|3c|5c|10c>-<100|500|1000> [--dry-run]    (GPUS: processes, default 8)
# VAE: local folder of the autoencoder, for sample grids
set -euo pipefail
cd "$(dirname "$0")/../.."
source bash_files/convert/sources.sh
sim=${args[0]:?usage: train_multi_source.sh sim1|sim2|sim3 SETUP [--dry-run]}
setup=${args[1]:?usage: train_multi_source.sh sim1|sim2|sim3 SETUP [--dry-run]}
nums=${setup#*-}
train() { # name of the data set
  launch train_edm2.py --outdir="training-runs/$sim-edm2-img256-xs-$1" \
    --data="$datasets/latent_datasets/$sim/inet-256-${1%-nlr}.zip" --preset="edm2-img256-xs-$setup" --batch=$((1024 * 8)) \
    --status=64Ki --snapshot=16Mi --checkpoint=64Mi ${VAE:+--vae="$VAE"}
}
if [ "${setup%%-*}" = 1c ]; then
  classes=$(classes_of "$sim")
  for class in ${classes//,/ }; do train "$class-${nums%-nlr}"; done
else
  train "$setup"
fi
