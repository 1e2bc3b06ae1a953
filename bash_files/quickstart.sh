#!/usr/bin/env bash
# Does one conditional model trained on several sources beat one model per source? On real digits, set-up included.
# Options go to run_experiment.py: --budget=smoke, --set sources=0,1,2,3,4, --set per_source=100, --list, ...
source "$(dirname "$0")/setup.sh"
exec python run_experiment.py experiments/quickstart.yaml "$@"
