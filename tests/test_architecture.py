"""Arrows point one way: nothing imports what stands above it."""

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
# {part of the package: the parts that it may import}; all may import themselves and SHARED.
SHARED = {"_device", "_files", "_precision", "_version"}
OPERATORS = {"ops", "reference", "kernels", "_extension"}
MODELS = {"models", "modules"} | OPERATORS
MAY_IMPORT = {
    "cli": {"", "diffusion", "training", "evaluation", "inference", "attribution", "tiling", "data"}
    | {"acceleration", "integrations"}
    | MODELS,
    "training": {"data", "diffusion"} | MODELS,
    "evaluation": {"data", "diffusion"} | MODELS,
    "attribution": {"freezing"} | MODELS,
    "inference": {"tiling", "data", "freezing"} | MODELS,
    "integrations": MODELS,
    "acceleration": {"modules"} | OPERATORS,
    "tiling": MODELS,
    "diffusion": MODELS,
    "freezing": {"acceleration"} | MODELS,
    "models": {"modules"} | OPERATORS,
    "modules": OPERATORS,
    "ops": {"reference", "kernels", "_extension"},
    "reference": set(),
    "kernels": set(),
    "_extension": set(),
    "data": set(),
    **dict.fromkeys(SHARED, set()),
    "": {"acceleration", "models", "modules", "ops", "reference", "inference", "freezing"},  # ipt_fast/__init__.py
}


def files():
    """(path, its parts below ipt_fast) of all files; kernels/ is installed as ipt_fast.kernels."""
    for path in sorted(REPOSITORY.glob("ipt_fast/**/*.py")):
        parts = path.relative_to(REPOSITORY / "ipt_fast").parts
        if parts[0] != "kernels":
            yield path, parts
    for path in sorted(REPOSITORY.glob("kernels/**/*.py")):
        yield path, path.relative_to(REPOSITORY).parts


def imports_of(path, parts):
    """(line, part of ipt_fast) of everything that a file imports from it, also inside functions; "" is the package."""
    package = list(parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top, *names = alias.name.split(".")
                if top == "ipt_fast":
                    yield node.lineno, names[0] if names else ""
        elif isinstance(node, ast.ImportFrom):
            names = node.module.split(".") if node.module else []
            if node.level:
                base = package[: len(package) - node.level + 1]
            elif names[:1] == ["ipt_fast"]:
                base, names = [], names[1:]
            else:
                continue
            for alias in node.names:
                # From the package itself come its parts, or names that it defines.
                found = [*base, *names, alias.name if alias.name in MAY_IMPORT else ""]
                yield node.lineno, found[0]


def test_nothing_imports_what_stands_above_it():
    wrong = []
    for path, parts in files():
        part = "" if parts == ("__init__.py",) else parts[0].removesuffix(".py")
        for line, other in imports_of(path, parts):
            if other != part and other not in MAY_IMPORT[part] | SHARED:
                wrong.append(f"{'/'.join(parts)}:{line} imports {other or 'ipt_fast itself'}")
    assert wrong == []


def test_the_test_sees_an_arrow_upwards(tmp_path):
    file = tmp_path / "one.py"
    file.write_text(
        "import ipt_fast.cli.train\ndef f():\n    from ...models import ipt\n    from ... import inference\n"
    )
    found = [part for _, part in imports_of(file, ("ops", "deep", "one.py"))]
    assert found == ["cli", "models", "inference"]


@pytest.mark.parametrize("part", sorted({parts[0].removesuffix(".py") for _, parts in files()} - {"__init__"}))
def test_every_part_has_its_place(part):
    assert part in MAY_IMPORT
