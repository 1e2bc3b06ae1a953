#!/usr/bin/env bash
# Everything that needs a GPU, at most 8 minutes, no network: tables are appended to benchmarks/RESULTS.md.
# usage: benchmarks/gpu.sh [--dest FILE]    (PYTHON: interpreter, default the .venv or python3)
source "$(dirname "$0")/../bash_files/help.sh"
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}"
PYTHONUNBUFFERED=1 exec timeout 480 "$python" benchmarks/gpu.py --dest=benchmarks/RESULTS.md "$@"
