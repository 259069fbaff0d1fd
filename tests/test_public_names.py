"""Names that programs outside hold on to: of modules, of the command line and of the JSON it writes.

``public_names.json`` holds them as they were published. Of a module these are the names that it defines, and those of
ipt_fast that can be imported from it. A name may move, but it stays importable from where it was; what is new is added
to the list when it is released.
"""

import argparse
import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from ipt_fast import cli, create_model

PUBLISHED = json.loads(Path(__file__).with_name("public_names.json").read_text())


@pytest.mark.parametrize("module", PUBLISHED["modules"])
def test_names_of_modules(module):
    if module == "ipt_fast.kernels" and importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    found = importlib.import_module(module)
    assert [name for name in PUBLISHED["modules"][module].split() if not hasattr(found, name)] == []


def test_modules_that_come_with_the_package():
    names = ("ops.layers", "ops.merge", "reference.layers", "reference.merge")
    program = "import ipt_fast; " + ", ".join(f"ipt_fast.{name}" for name in names)
    subprocess.run([sys.executable, "-c", program], check=True)


def options_of(command):
    subparsers = argparse.ArgumentParser().add_subparsers()
    importlib.import_module(f"ipt_fast.cli.{command}").add_parser(subparsers)
    actions = subparsers.choices[command]._actions
    return {name: action for action in actions for name in action.option_strings or [action.dest]}


def test_no_command_is_missing():
    assert set(PUBLISHED["commands"]) <= set(cli.COMMANDS)


@pytest.mark.parametrize("command", PUBLISHED["commands"])
def test_options_with_their_defaults_and_choices(command):
    options = options_of(command)
    for name, published in PUBLISHED["commands"][command].items():
        assert name in options
        # JSON has no tuples.
        assert json.loads(json.dumps(options[name].default)) == published["default"], name
        assert set(published.get("choices", ())) <= set(options[name].choices or ()), name


def keys_of(value):
    """The keys of objects within objects, as a.b; of a list those of its first entry."""
    if isinstance(value, list):
        return keys_of(value[0]) if value else set()
    if not isinstance(value, dict):
        return set()
    return {f"{key}.{inner}" if inner else key for key, each in value.items() for inner in keys_of(each) or {""}}


def test_fields_of_eval(tmp_path):
    (tmp_path / "images").mkdir()
    PIL.Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / "images" / "black.png")
    data, report = str(tmp_path / "images"), tmp_path / "report.json"
    assert cli.main(["eval", "--data", data, "--sigma", "25", "--json", str(report), "--device", "cpu"]) == 0
    assert set(PUBLISHED["json"]["eval"].split()) <= keys_of(json.loads(report.read_text()))


@pytest.mark.parametrize("name", ["ipt_tiny", "ipt_v2_tiny"])
def test_fields_of_a_saved_config(name, tmp_path):
    create_model(name).save_pretrained(tmp_path)
    assert set(json.loads((tmp_path / "config.json").read_text())) == set(PUBLISHED["json"][name].split())


def test_the_restorer_is_at_the_top_and_imported_when_asked_for():
    program = "import sys, ipt_fast; assert 'PIL' not in sys.modules; from ipt_fast import Restorer, restore\n"
    program += "from ipt_fast import inference; assert (Restorer, restore) == (inference.Restorer, inference.restore)"
    subprocess.run([sys.executable, "-c", program], check=True)
