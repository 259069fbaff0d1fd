"""Rivals in other runtimes compute the same, every contender is a row of pytest-benchmark's table, rates are real."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch

import ipt_fast
from benchmarks import measure, registry, results, rivals, roofline
from tests.models.micro import micro_model

ROOT = pathlib.Path(__file__).parents[2]
CONTENDERS = [
    pytest.param(
        name, dtype, id=f"{name} {dtype}", marks=[] if (name, dtype) == ("openvino", "float32") else pytest.mark.slow
    )
    for name in rivals.PACKAGES
    for dtype in measure.DTYPES
    if name != "onnxruntime" or dtype == "float32"
]


def made(name, module, inputs, dtype):
    if reason := rivals.missing(name):
        pytest.skip(reason)
    calls, left_out = rivals.contenders(module, inputs, dtype, only=(name,))
    assert not left_out
    return calls[name]


def assert_right(call, expected, dtype):
    right, left_out = measure.right_ones({"ipt_fast": lambda: expected, "rival": call}, dtype)
    assert "rival" in right, left_out


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "dtype"), CONTENDERS)
def test_a_layer_in_other_runtimes(name, dtype):
    dtype = measure.DTYPES[dtype]
    case = registry._grid_layer(8, 2, 16, grid=4)
    inputs = case.inputs(dtype)
    module, data = case.baked("eager", inputs)
    call = made(name, module, data, dtype)
    assert call().dtype == dtype and call().shape == data[0].shape
    assert_right(call, case.rivals["eager"](*inputs, **case.keywords), dtype)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "dtype"), CONTENDERS)
def test_a_model_in_other_runtimes(name, dtype):
    dtype = measure.DTYPES[dtype]
    model, x = micro_model(merged=True, depths=(2, 0, 0, 0)), torch.rand(1, 3, 24, 48)
    call = made(name, model.to_reference(), [x], dtype)
    with torch.no_grad():
        assert_right(call, model(x), dtype)


def test_a_rival_that_computes_something_else_is_left_out():
    exact = torch.rand(3, 4)
    calls = {"ipt_fast": exact, "right": exact + 1e-6, "wrong": exact * 1.01, "nan": exact * float("nan")}
    right, left_out = measure.right_ones({name: lambda out=out: out for name, out in calls.items()}, torch.float32)
    assert list(right) == ["ipt_fast", "right"] and list(left_out) == ["wrong", "nan"]
    assert left_out["wrong"].startswith("it computes something else: in torch.float32 its error is 1.0e-02")
    with pytest.raises(AssertionError, match="ipt_fast: it computes something else"):
        measure.right_ones({"ipt_fast": calls["nan"].clone}, torch.float32)


def test_what_is_not_installed_is_left_out_by_name(monkeypatch):
    monkeypatch.setattr(rivals.importlib.util, "find_spec", lambda name: None)
    calls, left_out = rivals.contenders(torch.nn.Identity(), [torch.rand(1)], torch.float32)
    assert not calls and set(left_out) == set(rivals.PACKAGES)
    assert left_out["openvino"] == "openvino not installed (pip install .[rivals])"


TINY = """
import pytest, torch
from benchmarks import measure, results
from benchmarks.conftest import pytest_terminal_summary
from benchmarks.roofline import Work

order = []

def turn(name):
    return lambda: order.append(name)

@pytest.mark.parametrize("size", [1, 2])
def test_tiny(benchmark, size):
    order.clear()
    calls = {name: turn(name) for name in ("ipt_fast", "eager", "openvino")}
    rows = measure.interleaved(benchmark, f"case {size}", calls, rounds=3)
    assert order == ["ipt_fast", "eager", "openvino"] * (3 if rows else 1)
    results.record(rows, f"case {size}", "float32", "training", Work(10, 10), {"onnxruntime": "why"})
"""


def run(folder, *options, **environment):
    (folder / "test_tiny.py").write_text(TINY)
    (folder / "conftest.py").write_text("from benchmarks.conftest import pytest_terminal_summary")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_tiny.py", *options]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    # A worker's tests are not timed.
    outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment = {**outside, "PYTHONPATH": path, **environment}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_contender_is_a_row_and_ratios_close_the_run(tmp_path):
    csv = tmp_path / "rows.csv"
    out = run(tmp_path, "--benchmark-json=run.json", "--benchmark-save=first", IPT_FAST_BENCH_CSV=str(csv))
    rows = json.loads((tmp_path / "run.json").read_text())["benchmarks"]
    assert [(row["group"], row["name"]) for row in rows] == [
        (f"case {size}", name) for size in (1, 2) for name in ("ipt_fast", "eager", "openvino")
    ]
    assert len({row["fullname"] for row in rows}) == 6 and all(len(row["stats"]["data"]) == 3 for row in rows)
    assert rows[0]["extra_info"]["kind"] == roofline.kind() and rows[0]["extra_info"]["left_out"]
    for size in (1, 2):
        assert re.search(rf"benchmark 'case {size}': 3 tests.*\n.*\n(-.*\n)((ipt_fast|eager|openvino) .*\n){{3}}", out)
        assert re.search(rf"\d\.\d\dx  case {size}: ipt_fast .*, (eager|openvino) ", out)
    assert "geometric mean of 2; a rival is faster in" in out and "left out: onnxruntime, why" in out
    recorded = results.read(csv)
    assert len(recorded) == 6 and {row["kind"] for row in recorded} == {roofline.kind()}

    out = run(tmp_path, "--benchmark-compare=0001")
    assert len(re.findall(r"^openvino \(0001_first\) ", out, re.M)) == 2


@pytest.mark.slow
def test_histograms_and_runs_without_timing(tmp_path):
    assert "geometric mean" not in run(tmp_path, "--benchmark-disable")
    pytest.importorskip("pygal")
    run(tmp_path, "--benchmark-histogram=shown")
    assert all(name in (tmp_path / "shown-case_1.svg").read_text() for name in ("eager", "openvino", "ipt_fast"))


def test_work_and_its_least_time():
    case = registry._leffn_layer(8, 16)
    work = case.work(case.inputs(torch.float32))
    products, depthwise = 2 * 256 * 2 * 8 * 32, 2 * 256 * 25 * 32
    assert (work.flops, work.depthwise) == (products + depthwise, depthwise)
    assert work.bytes == 4 * (2 * 8 * 256 + 8 + 2 * 8 * 32 + 25 * 32)
    rates = roofline.Rates(threads=1, fma=1e9, bf16=4e9, copy=1e12)
    assert rates.seconds(work, torch.float32) == pytest.approx((products + depthwise) / 1e9)
    assert rates.seconds(work, torch.bfloat16) == pytest.approx(products / 4e9 + depthwise / 1e9)
    assert rates.seconds(work * 3, torch.float32) == pytest.approx(3 * rates.seconds(work, torch.float32))
    assert roofline.Rates(1, 1e30, 1e30, 1e3).seconds(work, torch.float32) == work.bytes / 1e3


def test_depthwise_convolutions_of_a_model():
    model, x = micro_model(merged=True, depths=(1, 0, 0, 0)), torch.rand(1, 3, 16, 16)
    twin = model.to_reference().to("meta")
    width, hidden = model.config.width, model.config.ffn_ratio * model.config.width
    pixels = 256
    expected = 2 * pixels * 3 * width * (9 + 9 * 2)  # qkv at encoder and, twice as wide, decoder
    expected += 2 * pixels * hidden * 25 * 3
    assert roofline.depthwise_flops(twin, [x]) == expected


def test_the_measured_roofline(monkeypatch):
    if roofline.shutil.which("c++") is None:
        pytest.skip("no compiler")
    rates = roofline.rates(1)
    assert 1e8 < rates.copy < 1e13 and 1e9 < rates.fma < 1e13 and rates.bf16 >= rates.fma
    assert roofline.kind() in (*roofline.KINDS.values(), "generic")
    monkeypatch.setenv("CXX", "no-such-compiler -x")
    roofline._probe.cache_clear()
    roofline.rates.cache_clear()
    with pytest.raises(RuntimeError, match="there is no compiler 'no-such-compiler'"):
        roofline.rates(1)
    assert roofline.share(roofline.Work(1, 1), torch.float32, 1.0) is None
    roofline._probe.cache_clear()


def test_layers_of_all_widths_of_the_models():
    names = {case.name for case in registry.CASES}
    for preset in ("ipt_v2_small", "ipt_v2_base"):
        config = ipt_fast.create_model(preset).config
        for level, size in enumerate((256, 256, 64, 32)):
            shape = f"1x{config.width << level}x{size}x{size}"
            for name in (
                "focal_attention_layer {} p32",
                f"grid_attention_layer {{}} g{config.grid_size}",
                "leffn_layer {}",
            ):
                assert name.format(shape) in names
