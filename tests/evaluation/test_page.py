"""The page with sliders: what is in the file, and what a real browser shows of it."""

import base64
import html.parser
import io
import re
import tracemalloc

import numpy as np
import PIL.Image
import pytest
from PIL import ImageCms

from ipt_fast.evaluation.page import Panel, is_page, write_page

from .browser import BROWSER, DRIVER, Browser

RED, GREEN, BLUE = (200, 30, 20), (20, 180, 40), (30, 50, 210)
EVIL = """</title><script>document.title="evil"</script>'"><img src=x onerror=alert(1)>&amp;\udcff"""


def flat(colour, height=60, width=90):
    return np.full((height, width, 3), colour, np.uint8)


class Reader(html.parser.HTMLParser):
    """Tags with their attributes, and the text of each."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append((self.tags[-1][0] if self.tags else "", data))

    def pictures(self):
        uris = [attributes["src"] for tag, attributes in self.tags if tag == "img"]
        return [PIL.Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1]))) for uri in uris]


def written(path, *images, **options):
    with write_page(path, "Title", "Note", **options) as page:
        for name, panels in images:
            page.add(name, panels, "20 dB")
    return Reader(path)


def test_a_page_loads_nothing_and_holds_all(tmp_path):
    read = written(tmp_path / "p.html", ("a.png", [Panel("Input", flat(RED)), Panel("Restored", flat(GREEN))]))
    urls = [value for _, each in read.tags for name, value in each.items() if name in ("src", "href", "data", "action")]
    assert len(urls) == 2 and all(url.startswith("data:image/png;base64,") for url in urls)
    assert "http" not in re.sub(r"http-equiv", "", (tmp_path / "p.html").read_text())
    assert not {"link", "iframe", "object", "base"} & {tag for tag, _ in read.tags}
    policy = next(each["content"] for tag, each in read.tags if each.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:; ") and "'unsafe-inline'; script-src 'sha256-" in policy
    first, second = read.pictures()
    assert (first.getpixel((5, 5)), second.getpixel((5, 5))) == (RED, GREEN)
    assert is_page(tmp_path / "p.html") and not is_page(__file__)
    assert [path.name for path in tmp_path.iterdir()] == ["p.html"]


def test_names_are_text_whatever_they_hold(tmp_path):
    path = tmp_path / "p.html"
    with write_page(path, EVIL, EVIL) as page:
        page.section(EVIL, EVIL)
        page.add(EVIL, [Panel(EVIL, flat(RED)), Panel(EVIL, flat(GREEN)), Panel(EVIL, flat(BLUE))], EVIL)
        page.fail(EVIL, EVIL)
    read = Reader(path)
    assert [tag for tag, _ in read.tags].count("script") == 1 and [tag for tag, _ in read.tags].count("img") == 3
    assert not [name for _, each in read.tags for name in each if name.startswith("on")]
    shown = EVIL.replace("\udcff", "\\udcff")
    assert [text for tag, text in read.texts if tag == "b"] == [shown, shown]
    assert [each["alt"] for tag, each in read.tags if tag == "img"] == [shown] * 3


@pytest.mark.parametrize(
    ("pixels", "alpha", "mode", "value"),
    [
        (np.full((9, 8), 77, np.uint8), None, "L", 77),
        (np.full((9, 8, 1), 257 * 77, np.uint16), None, "L", 77),
        (np.full((9, 8, 3), 257 * 5, np.uint16), None, "RGB", (5, 5, 5)),
        (np.full((9, 8, 3), 0.2), None, "RGB", (51, 51, 51)),
        (np.full((9, 8, 3), -1.5, np.float32), None, "RGB", (0, 0, 0)),
        (np.full((9, 8, 3), 9, np.uint8), np.full((9, 8), 128, np.uint8), "RGBA", (9, 9, 9, 128)),
        (np.full((9, 8, 1), 9, np.uint8), np.full((9, 8), 0, np.uint8), "LA", (9, 0)),
        (np.full((9, 8, 3), 257 * 9, np.uint16), np.full((9, 8), 65535, np.uint16), "RGBA", (9, 9, 9, 255)),
    ],
)
def test_kinds_of_images(tmp_path, pixels, alpha, mode, value):
    panel = Panel("Input", pixels, alpha)
    for picture in written(tmp_path / "p.html", ("a", [panel, panel])).pictures():
        assert (picture.mode, picture.size, picture.getpixel((4, 4))) == (mode, (8, 9), value)


def test_profiles_stay(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    panel = Panel("Input", flat(RED), icc_profile=profile)
    for picture in written(tmp_path / "p.html", ("a", [panel, panel])).pictures():
        assert picture.info["icc_profile"] == profile


def test_large_images_are_shrunk_and_small_inputs_enlarged(tmp_path):
    """Each version as large as the restored one, which is at most --html-size."""
    panels = [Panel("Input", flat(RED, 20, 40)), Panel("Restored", flat(GREEN, 80, 160))]
    for size, expected in ((100, (100, 50)), (500, (160, 80))):
        for picture in written(tmp_path / "p.html", ("a", panels), size=size).pictures():
            assert picture.size == expected
    with pytest.raises(ValueError, match="size must be at least 16 pixels; got 3"), write_page("p.html", "", size=3):
        pass


def test_large_pictures_are_jpegs_but_with_alpha(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (600, 500, 3), dtype=np.uint8)
    panels = [Panel("Input", noise), Panel("Restored", noise, np.full((600, 500), 200, np.uint8))]
    assert [picture.format for picture in written(tmp_path / "p.html", ("a", panels)).pictures()] == ["JPEG", "PNG"]


def test_memory_is_that_of_one_image(tmp_path):
    """The file of 40 images is several times as large as what writing it takes."""
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    panels = [Panel("Input", noise), Panel("Restored", noise)]
    tracemalloc.start()
    try:
        with write_page(tmp_path / "p.html", "Title") as page:
            for number in range(40):
                page.add(str(number), panels)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < (tmp_path / "p.html").stat().st_size / 4


def test_a_page_that_is_not_finished_is_not_there(tmp_path):
    (tmp_path / "p.html").write_text("before")
    with (
        pytest.raises(ValueError, match="panels must be two or three; got 1"),
        write_page(tmp_path / "p.html", "") as page,
    ):
        page.add("a", [Panel("Input", flat(RED))])
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("p.html", "before")]


@pytest.fixture(scope="module")
def browser():
    if not (DRIVER and BROWSER):
        pytest.skip("chromium and chromedriver are not installed")
    with Browser() as found:
        yield found


@pytest.fixture
def page(browser, tmp_path):
    """One image of two versions and one of three, opened."""
    two = [Panel("Input", flat(RED)), Panel("Restored", flat(GREEN))]
    with write_page(tmp_path / "p.html", "Photos", "a note") as page:
        page.add("a.png", two)
        page.add("b.png", [*two, Panel("Target", flat(BLUE))])
        page.fail("c.png", "cannot read it")
    browser.open(tmp_path / "p.html")
    browser.run("scrollTo(0, 0)")
    return browser


def box(browser, number):
    """(x, y, width, height) of a picture, which is brought into the window."""
    script = """
        const view = document.querySelectorAll(".view")[arguments[0]];
        view.scrollIntoView({block: "center"});
        const box = view.getBoundingClientRect();
        return [box.x, box.y, box.width, box.height];
    """
    return browser.run(script, number)


def border(browser, number, left, right, row=0.75):
    """Where the colour changes along a row of a picture, as a part of its width; both sides have the colours given."""
    x, y, width, height = box(browser, number)
    # Pixels at the ends are the picture's in part only.
    line = browser.screenshot()[round(y + row * height), round(x) + 2 : round(x + width) - 2].astype(int)
    at_left = np.abs(line - left).max(1) < 8
    at_right = np.abs(line - right).max(1) < 8
    edge = int(at_left.sum())
    assert at_left[:edge].all() and at_right[edge + 12 :].all()  # between them lie the bar and its shadow
    return (edge + 2) / width


def value(browser, number):
    return int(browser.run("return document.querySelectorAll('input')[arguments[0]].value", number))


def test_the_slider_starts_in_the_middle(page):
    assert border(page, 0, RED, GREEN) == pytest.approx(0.5, abs=0.02)
    assert border(page, 1, RED, GREEN) == pytest.approx(0.5, abs=0.02)
    assert [message for message in page.messages() if "favicon" not in message] == []


def test_the_keyboard_moves_it(page):
    box(page, 0)
    page.run("document.querySelectorAll('input')[0].focus()")
    page.press("\ue012" * 20)
    assert value(page, 0) == 30
    assert border(page, 0, RED, GREEN) == pytest.approx(0.3, abs=0.02)
    page.press("\ue014" * 50)
    assert border(page, 0, RED, GREEN) == pytest.approx(0.8, abs=0.02)
    assert value(page, 1) == 50  # the other one stays


@pytest.mark.parametrize("kind", ["mouse", "touch"])
def test_pointers_move_it(page, kind):
    x, y, width, height = box(page, 0)
    page.drag(kind, (x + 0.5 * width, y + height / 2), (x + 0.2 * width, y + height / 2))
    assert value(page, 0) == pytest.approx(20, abs=1)
    assert border(page, 0, RED, GREEN) == pytest.approx(0.2, abs=0.02)
    page.drag(kind, (x + 0.9 * width, y + height / 3), (x + 0.9 * width, y + height / 3))  # no need to hit the bar
    assert value(page, 0) == pytest.approx(90, abs=1)
    page.press("\ue014" * 3)  # it has the focus then
    assert value(page, 0) == pytest.approx(93, abs=1)


def test_versions_are_chosen(page):
    first, second, third = page.find("[data-pair]")
    page.click(second)
    assert border(page, 1, GREEN, BLUE) == pytest.approx(0.5, abs=0.02)
    page.click(third)
    assert border(page, 1, RED, BLUE) == pytest.approx(0.5, abs=0.02)
    pressed = page.run(
        "return [...document.querySelectorAll('[data-pair]')].map((b) => b.getAttribute('aria-pressed'))"
    )
    assert pressed == ["false", "false", "true"]
    labels = page.run("return [...document.querySelectorAll('.left, .right')].map((each) => each.textContent)")
    assert labels == ["Input", "Restored", "Input", "Target"]
    page.click(first)
    assert border(page, 1, RED, GREEN) == pytest.approx(0.5, abs=0.02)


def test_full_width(page):
    before = box(page, 0)[2]
    page.click(page.find(".wide")[0])
    assert box(page, 0)[2] > 1.3 * before
    page.click(page.find(".wide")[0])
    assert box(page, 0)[2] == before


def test_evil_names_do_nothing_in_a_browser(browser, tmp_path):
    with write_page(tmp_path / "p.html", EVIL, EVIL) as page:
        page.add(EVIL, [Panel(EVIL, flat(RED)), Panel(EVIL, flat(GREEN))], EVIL)
        page.fail(EVIL, EVIL)
    browser.open(tmp_path / "p.html")
    assert browser.run("return document.title").startswith("</title><script>")
    assert browser.run("return document.images.length") == 2
    assert border(browser, 0, RED, GREEN) == pytest.approx(0.5, abs=0.02)
    # Neither would another script run, were there one.
    browser.run(
        "const s = document.createElement('script'); s.textContent = 'document.title = 1'; document.body.append(s)"
    )
    assert browser.run("return document.title") != "1"
