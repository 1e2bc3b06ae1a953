#!/usr/bin/env bash
# Makes .venv from requirements.txt once, and again when that file changes; mends one that is half made. The other scripts do so
# by themselves.
# usage: bash bash_files/setup.sh [--list | --help]     (--list: say what would be installed and from where, install nothing)
# Linux, macOS 14 or newer on Apple processors, Windows within WSL; Python 3.11 to 3.14.
# PYTHON: the interpreter (the first that fits of python3, python3.14, ...). With `uv` on the path, uv installs, unless pip has
# settings of its own on where packages come from.
# TORCH: cpu; a CUDA build of torch's own index, such as cu126; registry: what pip gives by itself. Default: cpu where there is
# no NVIDIA GPU, else the build that its driver can run; registry, where torch's index is out of reach.
source "$(dirname "${BASH_SOURCE[0]}")/help.sh"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { echo "Error: $*" >&2; exit 2; }
fits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2> /dev/null; }

find_python() { # sets python, and uv where that is to install
  python=${PYTHON:-}
  if [ -z "$python" ]; then
    for python in python3 python3.14 python3.13 python3.12 python3.11 python; do if fits "$python"; then break; fi; done
  fi
  fits "$python" || fail "Python 3.11 to 3.14 is needed; set PYTHON to one (found: $("${PYTHON:-python3}" --version 2>&1 || echo none))"
  uv=$(command -v uv || true)
  if "$python" -m pip config list 2> /dev/null | grep -qE 'index-url|find-links|no-index|constraint'; then uv=; fi # it would not know
}

has() { # whether torch's own index has this build of our version
  "$python" - "$index/$1/torch/" "torch-$torch%2B$1-" << 'PYTHON' 2> /dev/null
import sys, urllib.request
sys.exit(sys.argv[2] not in urllib.request.urlopen(sys.argv[1], timeout=5).read().decode())
PYTHON
}

choose_torch() { # sets build and why
  torch=$(sed -n 's/^torch==//p' requirements.txt) index=https://download.pytorch.org/whl build=registry
  if [ -n "${TORCH:-}" ]; then
    build=$TORCH why="as TORCH says"
    [ "$build" = registry ] || has "$build" || fail "TORCH=$build: $index/$build has no torch $torch, or cannot be reached"
    return
  fi
  case "$(uname -s)" in
    MINGW* | MSYS* | CYGWIN*) fail "on Windows this runs within WSL (\`wsl --install\`), as on Linux" ;;
    Darwin)
      case "$(uname -m) $(sw_vers -productVersion)" in
        x86_64* | *" 1"[0-3].*) fail "torch $torch needs macOS 14 or newer on an Apple processor; try \`pip install -e .\`" ;;
      esac
      why="macOS" && return ;;
  esac
  cuda=$(nvidia-smi 2> /dev/null | sed -n 's/.*CUDA Version: *\([0-9]*\).*/\1/p' | head -n 1) || cuda=
  case "$cuda" in # a driver runs every build of its major version, and of older ones
    "") candidates=cpu why="no NVIDIA GPU here" ;;
    11) candidates=cu118 why="the driver knows CUDA 11" ;;
    12) candidates="cu129 cu128 cu126" why="the driver knows CUDA 12" ;;
    *) why="the driver knows CUDA $cuda" && return ;;
  esac
  for candidate in $candidates; do
    if has "$candidate"; then build=$candidate && return; fi
  done
  why="$why, but $index/${candidates##* } has no torch $torch or cannot be reached"
}

add() { # install, with progress
  if [ -n "$uv" ]; then "$uv" pip install --python .venv/bin/python "$@"; else .venv/bin/python -m pip install --disable-pip-version-check "$@"; fi
}

make_venv() { # unless there is one that works
  if fits .venv/bin/python && { [ -n "$uv" ] || .venv/bin/python -m pip --version > /dev/null 2>&1; }; then return; fi
  if [ -n "$uv" ]; then "$uv" venv --clear --python "$python" .venv; else "$python" -m venv --clear .venv; fi ||
    fail "$python cannot make .venv: install its venv module (Debian, Ubuntu: apt install python3-venv), or uv"
}

if [ "${BASH_SOURCE[0]}" = "$0" ] && [ "${1:-}" = --list ]; then
  find_python
  choose_torch
  echo "$("$python" --version), packages by ${uv:-pip} into $PWD/.venv"
  echo "torch $torch, build: $build ($why)"
  grep -v -e '^#' -e '^torch==' requirements.txt
  exit
fi
stamp=.venv/.set-up
wanted=$(cat requirements.txt pyproject.toml | cksum)
set_up=$(cat "$stamp" 2> /dev/null || true)
if [ "${set_up% *}" != "$wanted" ] || [ "${TORCH:-${set_up##* }}" != "${set_up##* }" ]; then
  find_python
  choose_torch
  echo "Setting up .venv, once: $("$python" --version), torch $torch, build: $build ($why)" >&2
  make_venv
  if [ "$build" = registry ]; then add "torch==$torch"; else add "torch==$torch+$build" --index-url "$index/$build"; fi
  add -r requirements.txt
  add --no-deps -e . "$(sed -n 's/^# alone: //p' requirements.txt)"
  echo "$wanted $build" > "$stamp"
fi
export PATH="$PWD/.venv/bin:$PATH"
