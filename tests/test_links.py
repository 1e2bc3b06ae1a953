"""Documents: what they link to and name in the code is there; the site (mkdocs.yml) holds all pages. Needs no network."""

import ast
import re
from functools import cache

import pytest
import yaml
from small_runs import ROOT

DOCUMENTS = sorted(p for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])
PAGES = [p for p in DOCUMENTS if p.parent.name == "docs"]


@cache
def text_of(path):
    return path.read_text(encoding="utf-8")


def prose(path):
    """Without blocks of code, which hold headings and brackets of their own."""
    return re.sub(r"^```.*?^```", "", text_of(path), flags=re.S | re.M)


def links(path):
    """(text, target) of links and pictures; inline code is none."""
    return re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", lambda m: "x" * len(m[0]), prose(path)))


@cache
def anchors(path):
    """Of headings, as GitHub and Python-Markdown make them: both agree on every one that is linked to."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", prose(path), re.M):
        bare = re.sub(r"[^\w\s-]", "", heading.lower()).strip()
        if re.sub(r"\s", "-", bare) == re.sub(r"[-\s]+", "-", bare):
            found.add(re.sub(r"\s", "-", bare))
    return found


def broken(path):
    """What is wrong with the links of a document."""
    for shown, target in links(path):
        if re.match(r"https?://|mailto:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        if not file.exists() or ROOT not in file.parents:
            yield f"{target}: no such file"
        elif path in PAGES and (ROOT / "docs") not in file.parents:
            yield f"{target}: outside of the site"
        elif anchor and anchor not in anchors(file):
            yield f"{target}: no such heading"
        elif file.suffix in (".png", ".svg") and not shown:
            yield f"{target}: says nothing to those who do not see it"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_links(path):
    assert list(broken(path)) == []


def test_broken_links_are_found(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(
        "# A b\n[a](#a-b) [b](#c) [c](page.md#a-b) [d](no.md) [e](../up.md) `[f](code.md)`\n```\n[g](no)\n```\n"
    )
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert [line.split(":")[0] for line in broken(page)] == ["#c", "no.md", "../up.md"]


def names_in(file):
    """Names that a module defines, with those of its classes: "f", "C", "C.method"."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else [node]
        names = [getattr(t, "name", getattr(t, "id", None)) for t in targets]
        yield from names
        if isinstance(node, ast.ClassDef):
            yield from (f"{node.name}.{n.name}" for n in node.body if isinstance(n, ast.FunctionDef))


ROOMS = "training|metrics|torch_utils|dnnlib|simulations|experiments|bash_files|benchmarks|tests|docs"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_no_bar_in_the_code_of_a_table(path):
    """`\\|` there is a bar on GitHub, and both letters on the site."""
    assert not re.findall(r"`[^`\n]*\\\|[^`\n]*`", prose(path))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_places_in_the_code(path):
    """`room/file.py` exists, and `room/file.py::Name` is defined there."""
    for place, name in re.findall(rf"`((?:{ROOMS})/[\w./-]*\w/?)(?:::([\w.]+))?`", prose(path)):
        generated = re.match(r"simulations/(results|figures)\b", place)
        assert generated or (ROOT / place).exists(), place
        assert not name or name in names_in(ROOT / place), f"{place}::{name}"


def test_the_site_holds_every_page():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = [p for entry in site["nav"] for p in (next(iter(entry.values())) if isinstance(entry, dict) else [entry])]
    assert sorted(listed) == sorted(p.name for p in PAGES)
    assert site["theme"]["font"] is False  # nothing is fetched from elsewhere
    assert all((ROOT / "docs" / name).is_file() for name in site["extra_css"])
    pins = (ROOT / "docs" / "requirements.txt").read_text(encoding="utf-8")
    assert re.search(r"^mkdocs-material==\d", pins, re.M) and "mkdocs" not in (ROOT / "requirements.txt").read_text()
    indexed = {target for _, target in links(ROOT / "docs" / "index.md")}
    assert indexed >= {p.name for p in PAGES} - {"index.md"}


def test_the_mathematics_in_numbers():
    """The block of docs/mathematics.md: expm and an inverse against the process."""
    (block,) = re.findall(r"```python\n(.*?)```", text_of(ROOT / "docs" / "mathematics.md"), re.S)
    space = {}
    exec(block, space)
    assert space["snr"] > 0 and block.count("assert") == 1
