#!/usr/bin/env bash
# Does one conditional model trained on several sources beat one model per source? On real digits, set-up included.
# usage: bash bash_files/quickstart.sh [--budget=smoke] [--set NAME=VALUE] [--list] [options of run_experiment.py]
# --budget=smoke: try it in a minute. --set: such as sources=0,1,2,3,4 or per_source=100; all of them are at the top of
# experiments/quickstart.yaml. --list: the steps, nothing done. The same command again resumes.
source "$(dirname "$0")/help.sh"
cd "$(dirname "$0")/.."
for word in "$@"; do
  if [ "$word" = --list ]; then # whatever is installed will do
    for python in .venv/bin/python "${PYTHON:-python3}"; do
      if "$python" -c "import run_experiment" 2> /dev/null; then exec "$python" run_experiment.py experiments/quickstart.yaml "$@"; fi
    done
    echo "Nothing is installed yet; the steps as experiments/quickstart.yaml names them, {seed} for each of its seeds:"
    sed -n 's/^  - name: /  /p' experiments/quickstart.yaml
    exit
  fi
done
source bash_files/setup.sh
exec python run_experiment.py experiments/quickstart.yaml "$@"
