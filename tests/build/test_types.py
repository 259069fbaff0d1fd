"""The package's types as its users' checkers see them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ipt_fast

PACKAGE = Path(ipt_fast.__file__).parent
RIGHT = """
import numpy as np
import PIL.Image
import torch
from torch import Tensor
from typing import assert_type

import ipt_fast
from ipt_fast.inference import Restorer
from ipt_fast.models import IPT, IPTV2, IPTV2Config
from ipt_fast.modules import RepLeFFN

x = torch.rand(1, 32, 8, 8)
assert_type(ipt_fast.ops.layer_norm_2d(x, torch.ones(32), eps=1e-6), Tensor)
assert_type(ipt_fast.ops.grid_attention(x, None, num_heads=1, grid_size=4), Tensor)
assert_type(ipt_fast.reference.layer_norm_2d(x, torch.ones(32), bias=None), Tensor)
model = ipt_fast.create_model("ipt_v2_tiny", pretrained=True, merged=True)
model.save_pretrained("folder")
assert_type(IPT.from_pretrained("folder"), IPT)
assert_type(ipt_fast.load_checkpoint(IPTV2(IPTV2Config(width=24)), "file.pth"), IPTV2)
assert_type(ipt_fast.restore(np.zeros((8, 8)), model, tile=None, dtype=torch.bfloat16), np.ndarray)
assert_type(ipt_fast.restore(PIL.Image.new("L", (8, 8)), model), PIL.Image.Image)
restorer = Restorer(model, task="denoise", dtype="float16", device="cpu", progress=lambda done, total: None)
assert_type(restorer(x), Tensor)
table: dict[str, str | None] = ipt_fast.explain(model)
RepLeFFN(32, merged=True).reparameterize()


@ipt_fast.use_backend("reference")
def half(image: Tensor, scale: int = 2) -> Tensor:
    return image / scale


assert_type(half(x, scale=3), Tensor)
"""
WRONG = """
ipt_fast.ops.layer_norm_2d(x, 32)
ipt_fast.ops.leffn(x, x, x)
ipt_fast.ops.merge_depthwise(x, x, x, identity="yes")
ipt_fast.ops.grid_attention(x, num_heads=1, grid_size=4.0)
ipt_fast.reference.layer_norm_2d(x)
ipt_fast.create_model(3)
ipt_fast.restore("photo.png", model)
ipt_fast.restore(x, model, tile=0.5)
ipt_fast.restore(x, model, device=1.5)
Restorer(model, progress=lambda done: None)
RepLeFFN("32")
IPTV2Config(width="wide")
half("image")
ipt_fast.use_backend(None)
ipt_fast.no_such_name
"""


def test_a_users_code_is_checked(tmp_path):
    """Right code passes, and every wrong line is refused: the annotations say neither too little nor too much."""
    pytest.importorskip("mypy")
    user = tmp_path / "user.py"
    user.write_text(RIGHT + WRONG)
    process = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file=", "--follow-imports=silent", str(user)],
        env={**os.environ, "MYPYPATH": str(PACKAGE.parent)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    first = len(RIGHT.splitlines()) + 1
    refused = {int(line) for line in re.findall(r"user\.py:(\d+): error", process.stdout)}
    expected = {first + i for i, line in enumerate(WRONG.splitlines()) if line}
    assert refused == expected, process.stdout + process.stderr


def test_the_package_says_that_it_has_types():
    """Without this file, which the build copies (test_build.py looks), checkers ignore an installed package's types."""
    assert (PACKAGE / "py.typed").is_file()
