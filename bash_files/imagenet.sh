#!/usr/bin/env bash
# shellcheck disable=SC2154 # kinds and k are theirs
# Sourced by convert/, train/, generate/ and metrics.sh: steps (`kinds`, of K = `k` classes; 1: of single models) of
# experiments/imagenet.yaml for sim1 (one class per category, the paper's Sim 1), sim2 (mammals) or sim3 (dogs, its Sim 2) and
# so many images per class. The same command again resumes. OPTIONS go to run_experiment.py: --dry-run (check all, say what it
# would take), --list, --jobs=N, --budget=smoke, --set NAME=VALUE, ...
# IMAGENET: folder or archive of the class folders (downloads/imagenet/train); GPUS: processes of a training (as many as there
# are GPUs); BATCH, BATCH_GPU: images per step (8192), and of each process at a time (256); PRESET: row of training/presets.py
# (the paper's table 2; for K = 5 the published code's); VAE, METRICS, WEIGHTS: folder of the autoencoder, detectors,
# --weights=fid=FILE ...; SHOWN: images to look at (64); SEEDS: of training (0); DATASETS, REFS, RUNS, SAMPLES, OUT: folders of
# data, statistics, runs, images, results
source "$(dirname "${BASH_SOURCE[0]}")/help.sh"
case "${1:-}" in
  sim1 | sim2 | sim3) sim=$1 ;;
  Sim1 | Sim2 | Sim3) sim=sim${1#Sim} ;;
  level1 | level2 | level3) sim=sim$((4 - ${1#level})) ;; # their Python code counts the other way round
  *) echo "Error: '${1:-}' is no similarity level: give sim1, sim2 or sim3, then perhaps the images per class" >&2; exit 2 ;;
esac
shift
n=1000
if [[ "${1:-}" =~ ^[0-9]+$ ]]; then n=$1; shift; fi
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

visible=$(nvidia-smi --list-gpus 2> /dev/null | grep -c . || true)
if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then visible=$(tr ',' '\n' <<< "$CUDA_VISIBLE_DEVICES" | grep -c .); fi
gpus=${GPUS:-$((visible > 0 ? visible : 1))}
launch=""
if [ "$gpus" != 1 ]; then launch="torchrun --standalone --nproc_per_node=$gpus"; fi
most=$k
if [ "$k" = 1 ]; then most=10; fi
given=(--set "sims=$sim" --set "ks=$most" --set "ns=$n" --set pool=10 --set "launch=$launch")
if [ "$k" = 5 ]; then given+=(--set "preset_multi=edm2-img256-xs-{k}c-{n}"); fi
add() { if [ -n "$2" ]; then given+=(--set "$1=$2"); fi; } # setting, value or nothing
add source "${IMAGENET:-}"
add batch "${BATCH:-}"
add batch_gpu "${BATCH_GPU:-}"
if [ "$k" = 1 ]; then add preset_single "${PRESET:-}"; else add preset_multi "${PRESET:-}"; fi
add vae "${VAE:-}"
add metrics "${METRICS:-}"
add weights "${WEIGHTS:-}"
add data "${DATASETS:-}"
add refs "${REFS:-}"
add runs "${RUNS:-}"
add samples "${SAMPLES:-}"
add out "${OUT:-}"
add shown "${SHOWN:-}"
add seeds "${SEEDS:-}"
for kind in $kinds; do
  case "$kind-$k" in
    convert-* | encode-* | ref-*) given+=("--step=$kind-$sim") ;;
    table-*) given+=("--step=table") ;;
    score-*) given+=("--step=score-*") ;;
    *-1) given+=("--step=$kind-single-$sim-*") ;;
    *) given+=("--step=$kind-multi-$sim-${k}c-*") ;;
  esac
done
given+=(--with-needs "$@")
echo "+ python run_experiment.py experiments/imagenet.yaml$(printf ' %q' "${given[@]}")"
exec python run_experiment.py experiments/imagenet.yaml "${given[@]}"
