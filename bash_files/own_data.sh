#!/usr/bin/env bash
# Does one model of all your sources beat one model of each? From class folders of photos of any size (the sources; a zip of
# them will do) to the table and the figure, set-up included. The same command again resumes.
# usage: bash bash_files/own_data.sh FOLDER [OPTIONS]     (options go to run_experiment.py experiments/own-data.yaml)
#   --budget=smoke     try it in a minute
#   --set NAME=VALUE   resolution, per_source, val_per_source, preset, duration, seeds, sources, ...
#   --outdir=DIR       where the results go; default: a folder in results/
#   --list, --jobs=N, --step=NAME: see python run_experiment.py --help
source "$(dirname "$0")/help.sh"
set -euo pipefail
if [ ! -e "${1:-}" ]; then
  echo "Error: FOLDER ${1:-} is not there: name the folder that holds one folder of photos per source, then the options" >&2
  exit 2
fi
folder=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
shift
source "$(dirname "$0")/setup.sh"
exec python run_experiment.py experiments/own-data.yaml --set "source=$folder" "$@"
