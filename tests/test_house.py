"""The plan of the house: who may import whom, how long things may get, and what the loop must not know."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("dnnlib", "torch_utils", "training", "metrics", "simulations")
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))
FILES = sorted([*ROOT.glob("*.py"), *(p for room in ROOMS for p in (ROOT / room).rglob("*.py"))])

# Floors from the ground up: what each may import besides itself.
MAY_IMPORT = {
    "dnnlib": set(),
    "torch_utils": {"dnnlib"},
    "training": {"dnnlib", "torch_utils"},
    "metrics": {"dnnlib", "torch_utils", "training"},
    "simulations": {"dnnlib", "torch_utils", "training", "metrics"},
}
# A metric needs data and encoders, never the loop or what a run is made of.
NOT_FOR_METRICS = {"training.training_loop", "training.setup", "training.config", "training.feed", "training.hooks"}


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path, top_level_only=False):
    """Dotted names that a file imports from this project."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        yield from (n for n in names if n.split(".")[0] in {*ROOMS, *SCRIPTS})


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_down(path):
    room = name_of(path).split(".")[0]
    if room not in MAY_IMPORT:
        return  # a script may use every room
    for name in imports_of(path):
        top = name.split(".")[0]
        if top in SCRIPTS:
            assert room == "simulations" or top == "generate_images", f"{path.name} imports the script {top}"
            continue
        assert top == room or top in MAY_IMPORT[room], f"{name_of(path)} imports {name} from a floor above"
        if room == "metrics":
            assert name not in NOT_FOR_METRICS, f"{name_of(path)} imports {name}"


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


def test_the_loop_knows_no_paper():
    text = (ROOT / "training" / "training_loop.py").read_text(encoding="utf-8").lower()
    for word in ("pfgm", "cld", "mdm", "jest", "malda", "alda", "imagenet", "edm2loss", "digits"):
        assert word not in text
