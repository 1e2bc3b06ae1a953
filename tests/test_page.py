"""The report page: every number and picture of a known experiment where it belongs, parsed as a browser would; and the door."""

import base64
import colorsys
import io
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import PIL.Image
import pytest
from small_results import GRIDS, NAMES, RATIO, SEEDS, TABLE, grey, make_results
from small_runs import one_line, run

import report
from metrics.page import REAL, blocks_of

EMPTY = {"meta", "link", "img", "input", "source", "br"}


class Node:
    def __init__(self, tag, attributes, parent):
        self.tag, self.attributes, self.parent, self.children, self.own = tag, dict(attributes), parent, [], ""

    def all(self, tag=None, **attributes):
        """All nodes below with this tag and these attributes, in order."""
        named = {name.replace("_", "-"): value for name, value in attributes.items()}
        for child in self.children:
            if tag in (None, child.tag) and all(child.attributes.get(k) == v for k, v in named.items()):
                yield child
            yield from child.all(tag, **attributes)

    def one(self, tag, **attributes):
        (found,) = self.all(tag, **attributes)
        return found

    @property
    def text(self):
        return " ".join((self.own + " ".join(child.text for child in self.children)).split())


class Tree(HTMLParser):
    """The elements of a page; fails where a tag is closed that is not the last open one."""

    def __init__(self, text):
        super().__init__()
        self.root = self.at = Node("root", {}, None)
        self.feed(text)
        self.close()
        assert self.at is self.root

    def handle_starttag(self, tag, attributes):
        node = Node(tag, attributes, self.at)
        self.at.children.append(node)
        if tag not in EMPTY:
            self.at = node

    def handle_endtag(self, tag):
        assert self.at.tag == tag, f"</{tag}> closes <{self.at.tag}>"
        self.at = self.at.parent

    def handle_data(self, text):
        if self.at.tag in ("style", "script"):
            self.at.own += text
        else:
            self.at.children.append(leaf := Node("text", {}, self.at))
            leaf.own = text


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    from training.networks_edm2 import Precond

    net = Precond(8, 1, 2, model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[], channels_per_head=8)
    return make_results(tmp_path_factory.mktemp("page") / "moved", net)


@pytest.fixture(scope="module")
def written(results):
    run(report.main, results, f"--out={results.parent / 'page.html'}")
    return (results.parent / "page.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(written):
    return Tree(written).root


def pixels(node):
    kind, _, data = node.attributes["src"].partition(";base64,")
    assert kind in ("data:image/png", "data:image/webp")
    return np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))


def table(page, caption):
    """Rows of texts of the table with this caption."""
    (found,) = (t for t in page.all("table") if t.one("caption").text.startswith(caption))
    return [[cell.text for cell in row.children if cell.tag in ("th", "td")] for row in found.all("tr")]


def test_nothing_is_fetched(written, page):
    for node in page.all():
        for name in ("src", "srcset", "href", "action", "data", "poster"):
            value = node.attributes.get(name, "data:")
            assert value.startswith(("data:", "#")), f"{node.tag} {name}={value[:80]}"
    assert "url(" not in page.one("style").own and "@import" not in page.one("style").own
    assert "http" not in page.one("script").own and "fetch(" not in page.one("script").own
    policy = page.one("meta", http_equiv="Content-Security-Policy").attributes["content"]
    assert policy.startswith("default-src 'none'")


def test_what_the_data_say_is_text(written, page):
    """Class names and tables with markup in them are shown as they are."""
    assert len([*page.all("script")]) == 1 and not [*page.all("i")]
    assert any(image.attributes["alt"].endswith(", ".join(NAMES)) for image in page.all("img"))
    assert "<script>alert(1)</script>" in page.text and NAMES[0] in page.text and NAMES[1] in page.text
    assert "&lt;script&gt;alert" in written


def test_it_can_be_used_without_seeing(page):
    ids = [node.attributes["id"] for node in page.all() if "id" in node.attributes]
    assert len(ids) == len(set(ids))
    for node in page.all():
        for name in ("for", "aria-labelledby", "aria-describedby"):
            assert node.attributes.get(name, ids[0]) in ids, (node.tag, name)
        if node.attributes.get("href", "").startswith("#"):
            assert node.attributes["href"][1:] in ids
    assert all(len(node.attributes["alt"]) > 5 for node in page.all("img"))
    labelled = {node.attributes.get("for") for node in page.all("label")}
    inside = {id(control) for label in page.all("label") for control in label.all()}
    for control in [*page.all("input"), *page.all("select")]:
        assert control.attributes.get("id") in labelled or id(control) in inside
    assert all(node.attributes.get("scope") for node in page.all("th"))
    assert all(
        node.attributes.get("aria-label") and node.attributes.get("tabindex") == "0" for node in page.all(role="region")
    )
    levels = [int(node.tag[1]) for node in page.all() if re.fullmatch(r"h\d", node.tag)]
    assert levels[0] == 1 and levels.count(1) == 1 and all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False))
    assert (
        page.one("html").attributes["lang"] == "en" and page.one("title").text and page.one("main") and page.one("nav")
    )
    assert page.one("legend").text and page.one("output").attributes["role"] == "status"


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return np.dot([0.2126, 0.7152, 0.0722], linear)


def test_contrast(page):
    """WCAG 2.2, 1.4.3: 4.5 to 1 for text, in both schemes."""
    schemes = re.findall(r":root \{(.*?)\}", page.one("style").own, re.S)
    assert len(schemes) == 2
    for scheme in schemes:
        colours = dict(re.findall(r"--(\w+): (#\w{6})", scheme))
        for text in ("text", "muted", "link", "plus", "minus"):
            for back in ("back", "card"):
                high, low = sorted((luminance(colours[text]), luminance(colours[back])), reverse=True)
                assert (high + 0.05) / (low + 0.05) >= 4.5, (text, back)
    dark = [colorsys.rgb_to_hls(*(int(s[i : i + 2], 16) / 255 for i in (1, 3, 5)))[1] for s in
            (re.search(r"--back: (#\w{6})", scheme)[1] for scheme in schemes)]  # fmt: skip
    assert dark[0] > 0.9 and dark[1] < 0.2


def test_tables_and_answers(page):
    assert page.one("p", **{"class": "answer"}).text == "Loss: multi better than single in 1 of 2 sources"
    assert table(page, "Result by source") == [
        ["source", "loss multi", "loss single"], ["0", "1.054 ± 0.114", "1.056"], ["mean", "0.9", "a < b & c"],
    ]  # fmt: skip
    runs = {row[0]: row for row in table(page, "Where every run ended")}
    assert set(runs) == {"run", *(f"{name}-seed{s}" for name in ("multi", "single-0", "single-1") for s in SEEDS)}
    last = dict(zip(runs["run"], runs["multi-seed1"], strict=True))
    assert (last["model"], last["seed"], last["sources"]) == ("multi", "1", ", ".join(NAMES))
    assert (last["lowest validation loss"], last["at thousand images"], last["images/s"]) == ("1.0000", "3", "500")
    differ = {row[0]: row[1:] for row in table(page, "Options in which the runs differ")}
    assert differ == {"option": ["multi", "single"], "seed": ["0, 1", "0, 1"], "lr": ["0.02", "0.01"]}
    assert ["batch_size", "128"] in table(page, "Options that all runs share")


def test_samples_are_those_of_their_time(page):
    """Slider positions are training images of each source; every picture is that of its arm, seed and time."""
    form = page.one("form")
    wanted = sorted({k / 2 for k in GRIDS["multi"]} | {*map(float, GRIDS["single"])})
    assert json.loads(form.attributes["data-at"]) == [*wanted, None]
    slider = page.one("input", type="range")
    assert (slider.attributes["min"], slider.attributes["max"]) == ("0", str(len(wanted)))
    assert [r.attributes["value"] for r in page.all("input", type="radio")] == ["multi", "single", REAL]
    assert [option.text for option in page.all("option")] == list(SEEDS)
    seen = 0
    for figure in page.all("figure"):
        arm, seed = figure.attributes.get("data-arm"), figure.attributes.get("data-seed")
        if arm in GRIDS and "data-last" not in figure.attributes:
            per_source = 2 if arm == "multi" else 1
            times = [float(node.attributes["data-at"]) * per_source for node in figure.all("img")]
            assert times == list(GRIDS[arm])
            for kimg, node in zip(times, figure.all("img"), strict=True):
                assert pixels(node)[10, -10, 0] == grey(arm, seed, kimg)
                seen += 1
        elif arm in GRIDS:
            assert pixels(figure.one("img"))[10, -10, 0] == grey(arm, seed) and pixels(figure.one("img")).shape[0] > 128
        elif arm == REAL:
            shown = pixels(figure.one("img"))
            assert (shown[10, -10, 0], shown[-10, -10, 0]) == (250, 251)
    assert seen == 2 * (len(GRIDS["multi"]) + 2 * len(GRIDS["single"]))


def test_theory_and_plan(page, results):
    """Predicted from the parameters, counted here; measured from curves that are known: 1 + 10/n and 1 + 5.5/n."""
    from torch_utils.persistence import load_snapshot

    net = load_snapshot(next(results.glob("runs/multi-seed0/*.safetensors"))).net
    count = {name: p.numel() for name, p in net.named_parameters()}
    own = next(v for name, v in count.items() if "emb_label" in name) // 2
    beta = (sum(count.values()) - 2 * own) / (sum(count.values()) - own)
    predicted = f"{1 - beta / 2:.3g}"
    rows = table(page, "Ratio of excess negative log-likelihoods")
    assert [row[:2] for row in rows[1:]] == [[str(n), predicted] for n in (25, 50, 100)]
    assert all(float(row[2].split()[0]) == pytest.approx(RATIO, abs=2e-3) for row in rows[1:])
    worth = table(page, "An image of a source")
    assert [float(row[2].split()[0]) for row in worth[1:]] == pytest.approx([1 / RATIO] * 3, abs=0.01)
    assert table(page, "Gain of the target") == [
        ["target", "0", "1"],
        ["0", "–", "+0.180 helps"],
        ["1", "+0.180 helps", "–"],
    ]


def test_curves_have_both_schemes_and_words(page):
    pictures = [*page.all("picture")]
    alts = [picture.one("img").attributes["alt"] for picture in pictures]
    assert [alt.partition(":")[0] for alt in alts] == [
        "training loss", "validation loss", "validation loss by noise level σ", "validation loss by source",
        "learning rate", "throughput (images/s)",
    ]  # fmt: skip
    assert alts[1] == "validation loss: at the end 1.1 (multi), 1.1 (single)"
    for picture in pictures:
        dark = Node(
            "img", {"src": picture.one("source", media="(prefers-color-scheme: dark)").attributes["srcset"]}, None
        )
        assert pixels(picture.one("img"))[0, 0].mean() == 255 and pixels(dark)[0, 0].mean() < 60


def test_runs_alone_and_a_results_folder_without_runs(results, tmp_path):
    """Run folders are one comparison; a table alone is a page, too."""
    names = ["multi-seed0", "single-0-seed0"]
    out = tmp_path / "runs.html"
    run(report.main, *(results / "runs" / name for name in names), f"--out={out}")
    page = Tree(out.read_text()).root
    assert [row[0] for row in table(page, "Where every run ended")[1:]] == names
    assert page.one("title").text == "multi-seed0, single-0-seed0: report"
    assert [r.attributes["value"] for r in page.all("input", type="radio")] == names
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "table.md").write_text(TABLE)
    run(report.main, tmp_path / "plain", f"--out={out}")  # a page of before is replaced
    page = Tree(out.read_text()).root
    assert [node.text for node in page.all("h2")] == ["Result"] and not [*page.all("form")]


def test_what_is_refused(results, tmp_path):
    foreign = tmp_path / "notes.html"
    foreign.write_text("<p>mine</p>")
    one_line(report.main, results, f"--out={foreign}", says=["--dest", "not a report", "another place"])
    assert foreign.read_text() == "<p>mine</p>"
    one_line(report.main, tmp_path, f"--out={tmp_path / 'x.html'}", says="neither results")
    one_line(report.main, tmp_path / "nowhere", f"--out={tmp_path / 'x.html'}", says="nowhere")
    broken = tmp_path / "broken"
    shutil.copytree(results / "runs" / "multi-seed0", broken)
    (broken / "stats.jsonl").write_text("{")
    one_line(report.main, broken, f"--out={tmp_path / 'x.html'}", says=["broken", "stats.jsonl"])
    shutil.copytree(results / "scores", tmp_path / "bad" / "scores")
    (tmp_path / "bad" / "scores" / "x.json").write_text("[]")
    one_line(report.main, tmp_path / "bad", f"--out={tmp_path / 'x.html'}", says="x.json")
    assert not (tmp_path / "x.html").exists()


def test_markdown_of_reports():
    assert blocks_of("a\nb\n\n- x\n- y\n\n| p | q |\n| --- | --- |\n| 1 |  |\n") == [
        ("text", "a b"), ("list", ["x", "y"]), ("table", ["p", "q"], [["1", ""]]),
    ]  # fmt: skip
