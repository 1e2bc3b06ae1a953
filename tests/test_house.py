"""The plan of the house: who may import whom, how long things may get, and what the loop must not know."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("dnnlib", "torch_utils", "training", "metrics", "simulations")
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))
FILES = sorted([*ROOT.glob("*.py"), *(p for room in ROOMS for p in (ROOT / room).rglob("*.py"))])
RUNNABLE = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.py", "simulations/run_*.py", "simulations/plot_*.py", "benchmarks/*.py")
    for path in ROOT.glob(pattern)
)

# Floors from the ground up: what each may import besides itself. Scripts may use every room.
MAY_IMPORT = {
    "dnnlib": set(),
    "torch_utils": {"dnnlib"},
    "training": {"dnnlib", "torch_utils"},
    "metrics": {"dnnlib", "torch_utils", "training"},
    "simulations": {"dnnlib", "torch_utils", "training", "metrics"},
}
# A metric needs data and encoders, never the loop or what a run is made of.
NOT_FOR_METRICS = {"training.training_loop", "training.setup", "training.config", "training.feed", "training.hooks"}
MAX_ARGUMENTS = 12
# Signatures that papers or published code fix.
PUBLISHED = {
    "simulations.bounds.arm_bound",
    "training.networks_edm.unets.SongUNet.__init__",
    "training.samplers.heun_states",
}
TYPED_ROOMS = ("dnnlib", "torch_utils", "training", "metrics")


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imported_by_string(node):
    """The literal that a call of importlib.import_module or __import__ begins with, or None."""
    if not isinstance(node, ast.Call) or not node.args:
        return None
    function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
    literal = node.args[0].values[0] if isinstance(node.args[0], ast.JoinedStr) else node.args[0]
    if function not in ("import_module", "__import__") or not isinstance(literal, ast.Constant):
        return None
    return str(literal.value)


def imports_of(path, top_level_only=False):
    """Dotted names that a file imports from this project."""
    tree = tree_of(path)
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif (literal := imported_by_string(node)) is not None:
            names = [literal]
        else:
            continue
        yield from (n for n in names if n.split(".")[0] in {*ROOMS, *SCRIPTS})


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_down(path):
    name = name_of(path)
    room = name.split(".")[0]
    for other in imports_of(path):
        top = other.split(".")[0]
        if top in SCRIPTS:
            assert name in ("run_experiment", "plan"), f"{name} imports the script {top}"
        elif room in MAY_IMPORT:
            assert top == room or top in MAY_IMPORT[room], f"{name} imports {other} from a floor above"
        if room == "metrics":
            assert other not in NOT_FOR_METRICS, f"{name} imports {other}"


def test_imports_by_string_are_seen(tmp_path):
    file = tmp_path / "x.py"
    file.write_text(
        "import importlib\nimportlib.import_module('training.encoders')\n__import__('metrics')\n"
        "importlib.import_module(f'simulations.{x}'), importlib.import_module(BOOK['dnnlib']), print('training')\n"
    )
    assert set(imports_of(file)) == {"training.encoders", "metrics", "simulations."}


def test_no_import_goes_round():
    modules = {name_of(path): path for path in FILES}
    graph = {
        name: {
            m
            for n in imports_of(path, top_level_only=True)
            for m in (n, n.rpartition(".")[0])
            if m in modules and m != name
        }
        for name, path in modules.items()
    }
    for name in graph:  # a package re-exports its own parts: importing a part runs the package first
        graph[name] -= {p for p in graph[name] if name.startswith(p + ".")}
    done, path = set(), []

    def visit(name):
        assert name not in path, "imports go round: " + " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            path.append(name)
            for other in sorted(graph[name]):
                visit(other)
            path.pop()
            done.add(name)

    for name in graph:
        visit(name)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_is_too_long(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 500
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < 120, f"{node.name} is {node.end_lineno - node.lineno + 1} lines long"


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_thin(script):
    """Statements outside option decorators, docstrings and imports: what a script does itself."""
    tree = ast.parse((ROOT / f"{script}.py").read_text(encoding="utf-8"))
    lines = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            for statement in body:
                if not isinstance(statement, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)):
                    lines.update(range(statement.lineno, statement.end_lineno + 1))
    assert len(lines) <= 150, f"{script}.py has {len(lines)} lines of logic"


# What papers brought: none of it may show in the loop.
PAPERS = ("edm", "pfgm", "poisson", "cld", "langevin", "mdm", "malda", "alda", "jest", "stf", "imagenet", "digits")
DEFINES_CHOICES = ("losses", "processes", "selection", "networks_edm", "networks_edm2", "networks_toy", "encoders")


def test_the_loop_knows_no_paper():
    """No identifier and no string of the loop names a paper's idea, or a class or function of the rooms of choices."""
    choices = set()
    for room in DEFINES_CHOICES:
        place = ROOT / "training" / room
        for path in place.rglob("*.py") if place.is_dir() else [place.with_suffix(".py")]:
            choices |= {node.name for node in tree_of(path).body if isinstance(node, ast.ClassDef)}
    choices -= {"Objective", "Encoder", "Draws", "Process"}  # the contracts themselves
    tree = tree_of(ROOT / "training" / "training_loop.py")
    for node in ast.walk(tree):
        for field in ("id", "attr", "arg", "name", "module", "asname", "value"):
            text = getattr(node, field, None)
            if isinstance(text, str):
                assert text not in choices, f"line {node.lineno}: {text}"
                assert not [word for word in PAPERS if word in text.lower()], f"line {node.lineno}: {text}"


def functions_of(path):
    """(qualified name, node) of every function of a file that is no local one."""
    places = [(name_of(path), node) for node in tree_of(path).body]
    while places:
        where, node = places.pop()
        if isinstance(node, ast.ClassDef):
            places += [(f"{where}.{node.name}", child) for child in node.body]
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield f"{where}.{node.name}", node


def arguments_of(node, catch_all=True):
    """The arguments of a function except self and cls."""
    found = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    if catch_all:
        found += [a for a in (node.args.vararg, node.args.kwarg) if a is not None]
    return [a for a in found if a.arg not in ("self", "cls")]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_function_has_many_arguments(path):
    for name, node in functions_of(path):
        if name not in PUBLISHED:
            assert len(arguments_of(node, catch_all=False)) <= MAX_ARGUMENTS, f"{name}: pass a dataclass or **options"


def untyped(path):
    """Names of public functions and methods of a file without an annotation of every argument and the return."""
    for name, node in functions_of(path):
        parts = name[len(name_of(path)) + 1 :].split(".")
        special = parts[-1] in ("__init__", "__call__")
        if any(part.startswith("_") for part in (parts[:-1] if special else parts)):
            continue
        if any(a.annotation is None for a in arguments_of(node)) or (node.returns is None and parts[-1] != "__init__"):
            yield name


@pytest.mark.parametrize("path", [p for p in FILES if name_of(p).split(".")[0] in TYPED_ROOMS], ids=name_of)
def test_public_functions_are_typed(path):
    assert list(untyped(path)) == []


# Runs scripts one after the other as `python FILE --help` would, in one process where only their own folder and installed
# packages can be imported, but not this project; what one script imported from it is forgotten before the next.
HELP = """
import os, runpy, sys, traceback
from contextlib import redirect_stdout
root, without, *files = sys.argv[1:]
inside = lambda path: (path or "").startswith(root + os.sep) and "site-packages" not in path
sys.path[:] = [p for p in sys.path if p and os.path.realpath(p) != root and "__editable__" not in p]
sys.meta_path[:] = [f for f in sys.meta_path if "__editable__" not in getattr(f, "__module__", "")]
start = list(sys.path)
for name in filter(None, without.split(",")):
    sys.modules[name] = None  # importing it fails
for file in files:
    sys.path[:] = [os.path.dirname(file), *start]
    sys.argv = [file, "--help"]
    print("=" * 10, file, flush=True)
    code = None
    try:
        runpy.run_path(file, run_name="__main__")
    except SystemExit as err:
        code = err.code
    except BaseException:
        traceback.print_exc(file=sys.stdout)
        code = 1
    print("-" * 10, code, flush=True)
    for name in [n for n, m in sys.modules.items() if inside(getattr(m, "__file__", None))]:
        del sys.modules[name]
"""


def helps(files, folder, without=""):
    """{file: (exit code, output)} of `python FILE --help` in a folder where the project is not installed."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", HELP, str(ROOT.resolve()), without, *(str(ROOT.resolve() / f) for f in files)]
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    parts = [part.partition("\n") for part in run.stdout.split("=" * 10 + " ")[1:]]
    assert [part[0] for part in parts] == command[5:], run.stdout + run.stderr
    return {f: part[2].rsplit("-" * 10 + " ", 1) for f, part in zip(files, parts, strict=True)}


def test_promises_are_proved():
    """Every row of docs/promises.md names tests, and every test named there is one of ours."""
    rows = [
        line.split("|")[1:-1] for line in (ROOT / "docs" / "promises.md").read_text().splitlines() if line[:2] == "| "
    ]
    faults = [row for row in rows[1:] if "**" not in row[0] and "---" not in row[0]]
    assert len(faults) > 30
    for fault, _, proof in faults:
        named = re.findall(r"`(\w+\.py)::(test_\w+)`", proof)
        assert named, fault
        for file, name in named:
            assert f"def {name}(" in (ROOT / "tests" / file).read_text(), f"{fault}: {file}::{name}"


def test_every_script_prints_its_help_anywhere(tmp_path):
    for file, (text, code) in helps(RUNNABLE, tmp_path).items():
        assert code.strip() in ("0", "None") and "Usage:" in text or "usage:" in text, f"{file}:\n{text}"


def test_help_needs_no_torch(tmp_path):
    files = ["train_edm2.py", "generate_images.py", "calculate_metrics.py", "dataset_tool.py", "count_flops.py"]
    files += [file for file in RUNNABLE if file.startswith(("simulations/", "benchmarks/"))]
    for file, (text, code) in helps(files, tmp_path, without="torch,scipy,matplotlib").items():
        assert code.strip() in ("0", "None") and "Usage:" in text, f"{file}:\n{text}"
