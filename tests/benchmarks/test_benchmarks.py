"""The measurements themselves: rivals compute the same thing, parity gates speed, tables match the recorded rows."""

import pathlib

import pytest
import torch

import ipt_fast
from benchmarks import baseline, measure, performance, plot, results, table
from benchmarks.registry import CASES

ROOT = pathlib.Path(__file__).parents[2]


def test_every_operator_has_a_case():
    assert {case.name.split()[0] for case in CASES} >= set(ipt_fast.ops.__all__)


@pytest.mark.parametrize("size", [16, 13])
@pytest.mark.parametrize("with_bias", [True, False])
def test_sdpa_rival_computes_grid_attention(size, with_bias):
    qkv = torch.randn(2, 24, size, size + 3, dtype=torch.float64)
    bias_table = torch.randn(49, 2, dtype=torch.float64) if with_bias else None
    expected = baseline.formula("grid_attention")(qkv, bias_table, num_heads=2, grid_size=4)
    actual = baseline.sdpa_grid_attention(qkv, bias_table, num_heads=2, grid_size=4)
    torch.testing.assert_close(actual, expected)


def test_native_layer_norm_is_the_centred_norm():
    x, weight, bias = torch.randn(2, 8, 5, 3), torch.rand(8), torch.randn(8)
    expected = baseline.formula("layer_norm_2d")(x, weight, bias)
    torch.testing.assert_close(baseline.native_layer_norm(x, weight, bias), expected)


def test_plain_eager_runs_no_operator_of_ours_and_restores_them(monkeypatch):
    model = ipt_fast.create_model("ipt_v2_tiny", width=8, depths=(2, 1, 1, 1), window_size=4, grid_size=3)
    x = torch.rand(1, 3, 17, 20)
    expected, operators = model(x), [getattr(ipt_fast.ops, name) for name in ipt_fast.ops.__all__]
    with baseline.plain_eager(), monkeypatch.context() as patch:
        patch.setattr(ipt_fast.ops._operator.Operator, "__call__", None)
        actual = model(x)
    torch.testing.assert_close(actual, expected)
    assert [getattr(ipt_fast.ops, name) for name in ipt_fast.ops.__all__] == operators


def test_no_speed_is_reported_for_a_wrong_kernel():
    case = next(case for case in CASES if case.ours is ipt_fast.ops.merge_depthwise)
    inputs = case.inputs(torch.float32)
    measure.check_parity(case, inputs, torch.float32)
    wrong = type(case)(case.name, case.inputs, lambda *a: case.ours(*a) * 1.001, case.rivals, case.keywords)
    with pytest.raises(AssertionError, match="no speed is reported"):
        measure.check_parity(wrong, inputs, torch.float32)


def test_rows_are_appended_and_plotted(tmp_path):
    row = dict.fromkeys(results.COLUMNS, "x") | {"contender": "ipt_fast", "times_faster": "2.0"}
    path = tmp_path / "cpu.csv"
    results.append(path, [row])
    results.append(path, [row | {"times_faster": "3.0"}])
    assert [r["times_faster"] for r in results.read(path)] == ["2.0", "3.0"]
    plot.draw_headline(performance.headline_rows(), tmp_path / "speed.png")
    plot.draw_training(results.FOLDER / "train_ipt_tiny.csv", tmp_path / "training.png")
    for name in ("speed.png", "training.png"):
        assert (tmp_path / name).stat().st_size > 1000


def test_documents_show_the_recorded_figures():
    """`python -m benchmarks.performance` writes them."""
    readme = performance.README.read_text()
    assert performance.PAGE.read_text() == performance.page()
    assert performance.headline() in readme and performance.quality() in readme
    assert len(readme.splitlines()) <= 110


def test_times_and_memory_are_in_units_that_people_read():
    times = {0.0142: "14.2 µs", 1.5: "1.50 ms", 97.679: "97.7 ms", 999.0: "999 ms", 2343.601: "2.34 s", 636830: "637 s"}
    assert {value: table.time(value) for value in times} == times
    assert [table.memory(value) for value in (0.3358, 3.55, 10.05)] == ["344 MiB", "3.5 GiB", "10.1 GiB"]


def test_rivals_are_those_of_the_same_run():
    row = dict.fromkeys(results.COLUMNS, "x") | {
        "share_of_roofline": "",
        "cpu": "Intel(R) Xeon(R) Processor",
        "isa": "AVX512/amx",
        "kind": "",  # as in rows of old
        "threads": "2",
    }

    def run(date, **times):
        return [row | {"date": date, "contender": name, "median_ms": str(time)} for name, time in times.items()]

    rows = [
        *run("2026-01-01T00:00Z", ipt_fast=2, eager=3, sdpa=1),
        *run("2026-01-02T00:00Z", ipt_fast=1, eager=4, sdpa=5),
    ]
    (line,) = table.speed(rows).splitlines()[2:]
    assert line == "| x | x | x | x | 4.00 ms (eager) | 1.00 ms | **4.00** | - | eager, sdpa | 2026-01-02, x |"
    rows += run("2026-01-03T00:00Z", **{"ipt_fast": 2, "ipt_fast frozen": 1, "eager": 4, "openvino": 3})
    rows = [*rows[:-4], *(row | {"share_of_roofline": "0.25"} for row in rows[-4:])]
    plain, frozen = table.speed(rows).splitlines()[2:]
    assert (
        plain == "| x | x | x | x | 3.00 ms (openvino) | 2.00 ms | **1.50** | 25% | eager, openvino | 2026-01-03, x |"
    )
    assert "| 1.00 ms (frozen) | **3.00** | 25% | eager, openvino |" in frozen
    assert table.kind_of(row) == "Intel Xeon, AVX-512 and AMX, 2 cores"
    newer = row | {"cpu": "AMD EPYC", "isa": "AVX512/avx512", "kind": "avx512_bf16"}
    assert table.kind_of(newer) == "AMD EPYC, AVX-512 with bfloat16, 2 cores"


def test_profiles_as_a_table():
    shared = {"cpu": "Some CPU", "commit": "abc", "threads": "1", "case": "layer", "dtype": "float32"}
    shared |= {"median_ms": "2", "share_of_roofline": "0.5"}
    rows = [
        {**shared, "date": date, "part": part, "share": str(share)}
        for date, shares in (("2026-01-01T00:00Z", {"norm": 1.0}), ("2026-01-02T00:00Z", {"GELU": 0.9, "norm": 0.001}))
        for part, share in shares.items()
    ]
    (line,) = table.profile(rows).splitlines()[2:]
    assert line == "| layer | float32 | 1 | 2.00 ms | 50% | GELU 90% | 2026-01-02, abc |"


def test_the_plain_form_of_ipt():
    torch.manual_seed(0)
    shape = dict(image_size=12, features=4, layers=1, heads=3)
    for options in ({}, {"pos_every": True}, {"no_norm": True}):
        model, x = ipt_fast.create_model("ipt", **shape, **options), 255 * torch.rand(2, 3, 12, 12)
        ours = model(x)
        with baseline.plain_ipt():
            plain = model(x)
            by_plain = " ".join(type(node).__name__ for node in nodes(plain.grad_fn))
        assert (ours - plain).abs().max() < 1e-5 * 255
        by_ours = " ".join(type(node).__name__ for node in nodes(ours.grad_fn))
        for name in ("ipt_fast_norm_projection", "ipt_fast_add_norm_projection", "ipt_fast_add_norm_feed_forward"):
            assert name in by_ours and name not in by_plain


def nodes(root):
    """Of an autograd graph."""
    seen, waiting = set(), [root]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [parent for parent, _ in node.next_functions]
    return seen
