"""README, CONTRIBUTING and docs: every link leads somewhere, every block of code runs, every command exists."""

import argparse
import ast
import doctest
import importlib
import pathlib
import re
import shlex
import string
import sys

import numpy as np
import PIL.Image
import pytest
import torch

import ipt_fast
from ipt_fast import _extension, cli
from tests.oracles.foreign import write_foreign
from tests.oracles.public import public_module

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


# Blocks of code. Those below a line "<!-- slow -->" run with the slow tests. Files of the worked example, whose first
# line is their path, run in tests/test_worked_example.py.
BLOCK = re.compile(r"^(<!-- slow -->\n)?```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
SHAPE = re.compile(r"^ *(\w+) = .*# (\(\d+(?:, \d+)+\))", flags=re.MULTILINE)
SHELL = ("cd", "ipt-fast", "make", "pip", "python", "python3", "torchrun")


def blocks(page, language, slow=False):
    """(line, code) of each block to run, those that take minutes only where ``slow``."""
    text = page.read_text()
    for block in BLOCK.finditer(text):
        if (slow or not block[1]) and block[2] == language and not re.match(r"(#|//) \S+/\S+\n", block[3]):
            yield text.count("\n", 0, block.start(3)), block[3]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with the files that the pages name."""
    pixels = np.random.default_rng(0).integers(0, 256, (60, 70, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / "noisy.png")
    torch.save(ipt_fast.create_model("ipt_v2_tiny").state_dict(), tmp_path / "weights.pth")
    small = ipt_fast.create_model("ipt", tasks=("sr_x2",), features=4, layers=1)
    torch.save(small.state_dict(), tmp_path / "ipt_sr2.pt")
    monkeypatch.chdir(tmp_path)
    for name, value in (("RAY_USAGE_STATS_ENABLED", "0"), ("RAY_worker_niceness", "0")):
        monkeypatch.setenv(name, value)
    yield
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()


RUN = [pytest.param(page, False, id=page.name) for page in PAGES if [*blocks(page, "python")]]
RUN += [
    pytest.param(page, True, id=f"{page.name}, all of it", marks=pytest.mark.slow)
    for page in PAGES
    if [*blocks(page, "python", slow=True)] != [*blocks(page, "python")]
]


@pytest.mark.parametrize(("page", "slow"), RUN)
def test_python_blocks_run(page, slow, here):
    """In order, as one program. Shapes in comments and outputs after >>> are compared."""
    names = {}
    for line, code in blocks(page, "python", slow):
        if "onnx" in code:
            pytest.importorskip("onnxscript")
        if "from diffusers" in code:
            public_module("diffusers")
        if "integrations.spandrel" in code:
            write_foreign(pathlib.Path("model_x2.safetensors"), "SwinIR")  # skips where spandrel is not installed
        if "import ray" in code:
            pytest.importorskip("ray.data")
        if code.startswith(">>>"):
            if "C++" in code and not _extension.load():
                pytest.skip(f"an output of the compiled kernels: {_extension.error()}")
            test = doctest.DocTestParser().get_doctest(code, names, page.name, str(page), line)
            said = []
            runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
            runner.run(test, out=said.append, clear_globs=False)
            names = test.globs
            assert not said, "".join(said)
            continue
        # Statement by statement, as a name may get another shape in the next one.
        for statement in ast.parse(code).body:
            source = "\n".join(code.splitlines()[statement.lineno - 1 : statement.end_lineno])
            exec(compile("\n" * (line + statement.lineno - 1) + source, str(page), "exec"), names)
            for name, shape in SHAPE.findall(source):
                assert tuple(names[name].shape) == ast.literal_eval(shape), source


def test_shapes_are_compared():
    """The pages that call models and operators say what comes out."""
    found = {page.name: len(SHAPE.findall("".join(code for _, code in blocks(page, "python")))) for page in PAGES}
    assert {name for name, shapes in found.items() if shapes} >= {"README.md", "ipt.md", "restoring.md", "backends.md"}


@pytest.fixture(scope="module")
def parser():
    parser = argparse.ArgumentParser()
    subparsers = parser.add_subparsers(required=True)
    for command in cli.COMMANDS:
        importlib.import_module(f"ipt_fast.cli.{command}").add_parser(subparsers)
    return parser


def calls(page):
    """The words of each call of a program in the page's blocks without a language."""
    for _, code in blocks(page, ""):
        for line in code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words:
                end = words.index("&&") if "&&" in words else len(words)
                yield words[:end]
                words = words[end + 1 :]


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent.name == "docs" or page == PAGES[0]],
                         ids=lambda page: page.name)  # fmt: skip
def test_commands_exist(page, parser):
    """Every option of ipt-fast, every target of make and every module that is started."""
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for program, *words in calls(page):
        assert program in SHELL, f"{program} {words}"
        if program == "make":
            assert [word for word in words if "=" not in word and word not in targets] == []
        if "-m" in words and words[words.index("-m") + 1] != "ipt_fast.cli":
            assert importlib.util.find_spec(words[words.index("-m") + 1])
        if "ipt_fast.cli" in words:
            program, words = "ipt-fast", words[words.index("ipt_fast.cli") + 1 :]
        if program == "ipt-fast":
            _, rest = parser.parse_known_args([word for word in words if word != "..."])
            assert not [word for word in rest if word.startswith("-")], f"{page.name}: {words}"


def test_calls_are_found():
    found = [words for page in PAGES if page.name != "CONTRIBUTING.md" for words in calls(page)]
    assert len([words for words in found if words[0] == "ipt-fast"]) > 15
    assert {"train", "finetune", "restore", "eval", "convert", "plot", "info"} <= {words[1] for words in found}
