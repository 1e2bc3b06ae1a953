#!/usr/bin/env bash
# Does one model of all your sources beat one model of each? From a folder of class folders of photos, set-up included.
set -euo pipefail
for word in "$@"; do
  if [ "$word" = --help ]; then
    cat << 'HELP'
Usage: bash bash_files/own_data.sh FOLDER [OPTIONS]

  From class folders of photos of any size (the sources; a zip of them will do) to the table and the figure of one model of
  all sources against one model of each. Run the same command again to resume.

Options, which go to run_experiment.py experiments/own-data.yaml:
  --budget=smoke     Try it in a minute
  --set NAME=VALUE   resolution, per_source, val_per_source, preset, duration, seeds, sources, ...
  --out=DIR          Where the results go; default: a folder in results/
  --list, --jobs=N, --step=NAME: see python run_experiment.py --help
HELP
    exit
  fi
done
if [ ! -e "${1:-}" ]; then
  echo "Error: FOLDER ${1:-} is not there: name the folder that holds one folder of photos per source, then the options" >&2
  exit 2
fi
folder=$(realpath "$1")
shift
source "$(dirname "$0")/setup.sh"
exec python run_experiment.py experiments/own-data.yaml --set "source=$folder" "$@"
