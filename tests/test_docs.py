"""README, CONTRIBUTING and docs: every link leads somewhere."""

import pathlib
import re
import string

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def text_of(page):
    """The page without what stands between fences."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page):
    """Those that GitHub gives to headings."""
    headings = re.findall(r"^#+ (.*)$", text_of(page), flags=re.MULTILINE)
    dropped = string.punctuation.replace("-", "").replace("_", "")
    return {heading.lower().translate(str.maketrans("", "", dropped)).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_anchors(page):
    links = re.findall(r"\]\(([^)\s]+)\)", text_of(page))
    for link in links:
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.is_file(), f"{link}: there is no {target}"
        assert not anchor or anchor in anchors(target), f"{link}: no such heading; there are {sorted(anchors(target))}"


def test_every_page_can_be_reached_from_the_readme():
    reached, ahead = set(), [ROOT / "README.md"]
    while ahead:
        page = ahead.pop()
        if page in reached:
            continue
        reached.add(page)
        links = re.findall(r"\]\(([^)#\s]+\.md)[^)]*\)", text_of(page))
        ahead += [(page.parent / link).resolve() for link in links if not link.startswith("http")]
    assert reached >= set(PAGES)


def test_paths_in_backticks_exist():
    """Files of the repository that CONTRIBUTING names; <…> stands for any name."""
    for path in re.findall(r"`((?:ipt_fast|csrc|kernels|tests|benchmarks|docs)/[^`\s]+)`", text_of(PAGES[1])):
        assert any(ROOT.glob(re.sub(r"<[^>]*>", "*", path))), f"CONTRIBUTING names {path}, which does not exist"
