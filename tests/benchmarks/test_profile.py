"""Profiles by part: samples are given to source files; whole models are told by operator."""

import shutil
import subprocess

import pytest
import torch

import ipt_fast
from benchmarks import profile, registry, results
from tests.models.micro import micro_model

TOOLS = pytest.mark.skipif(
    not all(map(shutil.which, ("c++", "addr2line", "readelf"))), reason="needs a compiler and binutils"
)


def test_code_belongs_to_the_first_part_that_names_it():
    assert profile.part_of(["_mm512_fmadd_ps avx512fintrin.h", "multiply gemm.h", "multiply gram.h"]) == "Gram"
    assert profile.part_of(["fma vec_avx512.h", "block gemm.h", "run leffn_kernel.cpp"]) == "products"
    assert profile.part_of(["depthwise_rows<4> gram_strip.h"]) == "depthwise"
    assert profile.part_of(["run leffn_kernel.cpp"]) == "rest of the kernel"


@TOOLS
def test_samples_are_told_by_source_file(tmp_path):
    """A library named as ours, with line numbers, and what perf would print of samples in it."""
    (tmp_path / "ipt_fast").mkdir()
    (tmp_path / "gelu.h").write_text("static inline float gelu(volatile float* x) { return *x * 2; }\n")
    (tmp_path / "kernel.cpp").write_text(
        '#include "gelu.h"\nextern "C" float one(volatile float* x) { return gelu(x); }\n'
        'extern "C" int other() { return 7; }\n'
    )
    library = tmp_path / "ipt_fast/_C.some.so"
    subprocess.run(["c++", "-g", "-O2", "-shared", "-fPIC", "-o", library, tmp_path / "kernel.cpp"], check=True)
    symbols = subprocess.run(["nm", library], check=True, capture_output=True, text=True).stdout.splitlines()
    address = {line.split()[2]: int(line.split()[0], 16) for line in symbols if len(line.split()) == 3}
    start, offset = 0x7F0000000000, 0x1000
    places = {name: hex(address[name] - profile._offset_of_code(library) - offset + start)[2:] for name in address}
    samples = "\n".join(
        [
            f"PERF_RECORD_MMAP2 1/1: [{start:#x}(0x9000) @ {offset:#x} fe:00 1 2]: r-xp {library}",
            *[f"   {places['one']} ({library})"] * 2,
            f"   {places['other']} ({library})",
            "   7f9ba318c0c7 (/usr/lib/libgomp.so.1)",
        ]
    )
    assert profile.parts(samples) == {"GELU": 0.5, "rest of the kernel": 0.25, "waiting for threads": 0.25}


def test_a_model_by_operator(monkeypatch):
    model = micro_model(merged=True, depths=(1, 0, 0, 0))
    monkeypatch.setattr(ipt_fast, "create_model", lambda name, merged: model)
    median, shares, work = profile.model_operators("micro", 16, "float32", rounds=1)
    assert median > 0 and work.flops > work.depthwise > 0
    assert any(part.startswith("leffn_layer 1x") for part in shares) and shares["convolutions"] > 0
    assert sum(shares.values()) == pytest.approx(1)


def test_rows_of_a_profile(tmp_path):
    case = registry._leffn_layer(8, 16)
    rows = profile.rows_of(case.name, "float32", 1, 0.5, {"GELU": 1.0}, case.work(case.inputs(torch.float32)))
    results.write(tmp_path / "profile.csv", rows)
    (row,) = results.read(tmp_path / "profile.csv")
    assert (row["part"], row["share"], row["median_ms"], row["threads"]) == ("GELU", "1.000", "500.000", "1")
