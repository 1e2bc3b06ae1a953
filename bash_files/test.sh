#!/usr/bin/env bash
# All tests, set-up included.
# usage: bash bash_files/test.sh [--slow] [--browser] [--trackio] [--list] [options of pytest]
# --slow: the long ones too. --browser: those that drive one, too (chromium on the PATH, or CHROMIUM=FILE; the driver is installed).
# --trackio: those that read what it was sent, too (it is installed into .venv/trackio, with an older pillow).
# --list: the files of tests, nothing done. TEST_JOBS: processes (as many as cores).
source "$(dirname "$0")/help.sh"
cd "$(dirname "$0")/.."
marks="not slow"
for word in "$@"; do # those that are not ours go round to the end
  shift
  case "$word" in
    --slow) marks="" ;;
    --browser) driver=playwright && set -- "$@" "$word" ;;
    --trackio) export TRACKIO="$PWD/.venv/trackio" && set -- "$@" "$word" ;;
    --list)
      for file in tests/test_*.py; do echo "$file: $(sed -n -e 1s/\"\"\"//gp "$file")"; done
      exit
      ;;
    *) set -- "$@" "$word" ;;
  esac
done
source bash_files/setup.sh
if [ -n "${driver:-}" ] && ! python -c "import $driver" 2> /dev/null; then
  find_python
  add "$(sed -n 's/^# browser: //p' requirements.txt)"
fi
if [ -n "${TRACKIO:-}" ] && [ ! -d "$TRACKIO" ]; then
  python -m uv pip install --target "$TRACKIO" "$(sed -n 's/^# trackio: //p' requirements.txt)" "$(grep ^numpy== requirements.txt)"
fi
# Small tensors: two processes with one thread each beat one process with two.
jobs=${TEST_JOBS:-$(python -c "from dnnlib.util import usable_cores; print(usable_cores())")}
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec python -m pytest -m "$marks" -n "$jobs" "$@"
