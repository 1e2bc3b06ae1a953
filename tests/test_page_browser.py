"""The report page in a real browser, as a reader uses it: by keyboard, on a phone, in the dark, without scripts.

`bash bash_files/test.sh --browser tests/test_page_browser.py` needs a chromium (Debian: apt-get install chromium), found on the
PATH or named by CHROMIUM.
"""

import io
import os
import shutil

import numpy as np
import PIL.Image
import pytest
from small_results import GRIDS, grey, make_results
from small_runs import run

import report
from training.networks_edm2 import Precond

pytestmark = pytest.mark.browser
TIMES = sorted({k / 2 for k in GRIDS["multi"]} | {*map(float, GRIDS["single"])})


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    net = Precond(8, 1, 2, model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[], channels_per_head=8)
    make_results(folder / "moved", net)
    run(report.main, folder / "moved", f"--out={folder / 'page.html'}")
    return f"file://{folder / 'page.html'}"


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    assert path, "no browser: apt-get install chromium, or set CHROMIUM to one"
    with sync_playwright() as play:
        found = play.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def visit(browser, address):
    """Function (options of the context) -> open page; at the end, nothing was complained about and nothing else fetched."""
    contexts, said, fetched = [], [], []

    def go(width=1280, **options):
        contexts.append(browser.new_context(viewport={"width": width, "height": 844}, **options))
        page = contexts[-1].new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: fetched.append(request.url.partition(",")[0]))
        page.goto(address)
        return page

    yield go
    for context in contexts:
        context.close()
    assert said == [] and {url for url in fetched if not url.startswith("data:")} == {address}


def shown(page):
    """Brightness of each picture that the stage shows, in its last tile."""
    images = [image for image in page.locator(".stage img").all() if image.is_visible()]
    pictures = [PIL.Image.open(io.BytesIO(image.screenshot())) for image in images]
    return [int(np.asarray(picture.convert("L"))[-20, -20]) for picture in pictures]


def test_slider_and_switch_by_keyboard(visit):
    page = visit()
    said, slider = page.locator("output"), page.locator("[type=range]")
    assert shown(page) == [grey("multi", 0)] and said.inner_text() == "multi, seed 0: the networks that were scored"
    slider.focus()
    page.keyboard.press("Home")
    assert shown(page) == [] and "no samples there" in said.inner_text()  # of multi; single has some
    for index, time in enumerate(TIMES):
        past = [k for k in GRIDS["multi"] if k / 2 <= time]
        assert shown(page) == [grey("multi", 0, k) for k in past[-1:]]
        assert f"after {time:.3g} thousand training images of each source" in said.inner_text()
        assert slider.get_attribute("aria-valuetext") in said.inner_text() and slider.input_value() == str(index)
        page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    page.locator("[type=radio]").first.focus()
    page.keyboard.press("ArrowRight")
    assert shown(page) == [grey("single", 0, 3)] * 2  # a picture of each of its runs, which ended long before
    captions = [caption.inner_text() for caption in page.locator(".stage figcaption").all() if caption.is_visible()]
    assert captions == [f"single-{k}-seed0, after 3 thousand images of each source" for k in (0, 1)]
    page.locator("select").select_option("1")
    assert shown(page) == [grey("single", 1, 3)] * 2 and said.inner_text().startswith("single, seed 1")
    page.locator("[type=radio]").nth(1).focus()
    page.keyboard.press("ArrowRight")
    assert shown(page) == [251] and slider.is_disabled() and said.inner_text().startswith("real images")


def test_everything_is_reached_by_tab_and_has_a_name(visit):
    page, names = visit(), []
    for _ in range(60):
        page.keyboard.press("Tab")
        name = page.evaluate(
            "(e => e === document.body ? null : [e.tagName, e.getAttribute('aria-label') || (e.labels && e.labels.length ?"
            " e.labels[0].innerText : e.innerText)])(document.activeElement)"
        )
        if name is None:
            break
        names.append(name)
    assert names[0] == ["A", "Skip to the content"] and all(text.strip() for _, text in names)
    assert {"INPUT", "SELECT", "SUMMARY", "DIV"} <= {tag for tag, _ in names}
    tree = page.locator("form").aria_snapshot()
    for part in (
        'group "Model"',
        'radio "multi" [checked]',
        'radio "single"',
        'combobox "Training seed"',
        'slider "Training"',
        "status:",
    ):
        assert part in tree, tree


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_and_follows_the_scheme(visit, width, scheme):
    page = visit(width, color_scheme=scheme)
    page.locator("summary").click()
    assert page.evaluate("document.documentElement.scrollWidth") == width
    inside = page.evaluate(
        "[...document.querySelectorAll('p, h1, h2, li, img, form, output')].filter(e => !e.closest('.scroll, .paper'))"
        ".filter(e => e.offsetParent && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"
    )
    assert inside == []
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (back == "rgb(255, 255, 255)") == (scheme == "light")
    corner = PIL.Image.open(io.BytesIO(page.locator(".curves img").first.screenshot())).convert("L").getpixel((3, 3))
    assert corner > 240 if scheme == "light" else corner < 60


def test_without_scripts(visit):
    page = visit(java_script_enabled=False)
    assert not page.locator("form").is_visible()
    count = page.locator(".stage img").count()
    assert count > 6 and len(shown(page)) == page.locator(".stage figure").count()
