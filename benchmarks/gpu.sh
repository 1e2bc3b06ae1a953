#!/usr/bin/env bash
# Everything that needs a GPU, at most 8 minutes, no network: tables are appended to benchmarks/RESULTS.md.
# usage: benchmarks/gpu.sh [--dest FILE]    (PYTHON: interpreter, default the .venv or python3)
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "${1:-}" = "--help" ] || [ "${1:-}" = "-h" ]; then sed -n 's/^# //p' "$0"; exit 0; fi
python="${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}"
PYTHONUNBUFFERED=1 exec timeout 480 "$python" benchmarks/gpu.py --dest=benchmarks/RESULTS.md "$@"
