"""The Triton kernels on CPU tensors, by Triton's interpreter, through the tests of every other backend.

The interpreter must be on before the kernels are imported, and then no kernel can be compiled: hence a process.
"""

import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is not installed (pip install ipt-fast[triton])")

# One call of every operator; the rest is slow. Options, and all windows, are tested on smaller maps.
OPTIONS = "two or released or biases or each_image or modulated or layer_scale"
RELATIVES = "dilated or overlapping or window_attention or gdfn or sgfn"
OF_LAYERS = "bias_free or windows or odd_window or no_bias or 3x3 or 33_channels or no_identity"
VARIANTS = f"{OF_LAYERS} or {OPTIONS} or {RELATIVES}"
SUBSET = f"fp32-small_same and not ({VARIANTS} or focal_attention_layer)"  # that one is among the options
SUBSET_BF16 = "bf16-small_fp32 and (layer_norm or merge or channel_attention- and not focal)"


def run(*arguments, **variables):
    environment = {**os.environ, "TRITON_INTERPRET": "1", **variables}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    return int(re.search(r"(\d+) passed", result.stdout)[1])


def test_parity_of_every_operator():
    selected = f"test_parity and ({SUBSET} or {SUBSET_BF16})"
    assert run("tests/ops/test_parity.py", "-k", selected, IPT_FAST_TEST_SIZES="1") > 10


def test_norms_of_few_channels():
    assert run("tests/ops/test_parity.py", "-k", "unusual and norm") == 2


def test_options_of_the_relatives():
    assert run("tests/ops/test_relatives.py", "-k", "fp32 or view") == 28


def test_tokens_too_short_to_be_normalised():
    assert run("tests/ops/test_windows.py", "-k", "too_short") == 2


def test_options_of_the_layers():
    layers = "leffn_layer-fp32 or grid_layer-fp16 or focal_layer-fp32"
    selected = f"norm_each_image-fp32 or {layers} or gate_of_zero and fp32 and not focal or wraps and corner0"
    assert run("tests/ops/test_options.py", "-k", selected) == 7


def test_the_range_of_channel_attention():
    of_options = "windows or dilated or overlapping or two or released"
    selected = f"large_image and all and 1e+25 or fp32 and (mixed-1e+25 or a_channel-1e-13) and not ({of_options})"
    assert run("tests/ops/test_range.py", "-k", selected) == 5


def test_gelu_of_every_number():
    assert run("tests/ops/test_gelu.py") == 5


def test_every_schedule():
    assert run("tests/ops/test_schedules.py", "tests/ops/test_schedules_of_layers.py") >= 4


def test_layers_of_ipt():
    assert run("tests/modules/test_transformer.py") >= 10


@pytest.mark.slow
def test_everything():
    files = [f"tests/ops/test_{name}.py" for name in ("parity", "options", "not_finite", "range", "relatives")]
    assert run(*files, "-k", "not (two or layer_scale)") > 900


def test_the_interpreter_accepts_cpu_tensors_and_nothing_else_does():
    code = (
        "import torch, ipt_fast\n"
        "x, w = torch.rand(1, 4, 3, 5), torch.ones(4)\n"
        "print(ipt_fast.explain('layer_norm_2d', x, w)['layer_norm_2d']['triton'])"
    )
    said = {}
    for interpret in ("0", "1"):
        environment = {**os.environ, "TRITON_INTERPRET": interpret}
        result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        said[interpret] = result.stdout.strip()
    assert said["1"] == "None"
    assert "NVIDIA" in said["0"] and "TRITON_INTERPRET=1" in said["0"]
