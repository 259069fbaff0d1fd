import re

import pytest
import torch

import ipt_fast
from ipt_fast import _extension
from ipt_fast.cli import main
from ipt_fast.models import shipped_models


def sections(text):
    """{operator: {backend: what is printed}} of the table at the end."""
    table, operator = {}, None
    for line in text.splitlines():
        if line in ipt_fast.ops.__all__:
            operator = table.setdefault(line, {})
        elif operator is not None and (match := re.fullmatch(r"\s+(\w+)\s+(.+)", line)):
            operator[match[1]] = match[2]
    return table


def test_info_prints_every_operator_and_backend(capsys):
    assert main(["info"]) == 0
    out, err = capsys.readouterr()
    table = sections(out)
    explained = ipt_fast.explain()
    assert set(table) == set(ipt_fast.ops.__all__) == set(explained)
    for operator, row in explained.items():
        assert table[operator] == {backend: reason or "yes" for backend, reason in row.items()}
    assert torch.__version__ in out and ipt_fast.__version__ in out
    assert all(name in out for name in ipt_fast.list_models())
    assert not err


def test_info_keeps_the_text_of_a_broken_extension(capsys, monkeypatch):
    monkeypatch.setattr(_extension, "error", lambda: "cannot be loaded: undefined symbol _Zfoo")
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert "undefined symbol _Zfoo" in sections(out)["layer_norm_2d"]["cpu"]
    assert sections(out)["layer_norm_2d"]["reference"] == "yes"


def test_info_and_help_say_what_the_models_that_ship_are_for(capsys):
    assert main(["info"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("ships")]
    shipped = shipped_models()
    assert lines == [f"ships    {name}: {purpose}" for name, purpose in shipped.items()]
    assert set(shipped) >= {"ipt_tiny", "ipt_v2_tiny"} and all(shipped.values())
    assert "gray" in shipped["ipt_tiny"] and "gray" in shipped["ipt_v2_tiny"]
    for command in ("restore", "eval", "plot"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert all(f"{name}: {purpose}" in text for name, purpose in shipped.items())
