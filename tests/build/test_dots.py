"""The products of pairs of bf16: AVX512_BF16's instructions and their emulation agree bit for bit."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ipt_fast import _extension
from tests.build.building import UNSET, copy_sources, succeed

ROOT = Path(__file__).resolve().parents[2]
AVX512 = ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
LANES = 16
# Signed zeros, subnormal numbers of both kinds, the smallest and the largest numbers, infinities, NaN.
SPECIAL = [
    0x0000,
    0x8000,
    0x0001,
    0x807F,
    0x0080,
    0x8080,
    0x3F80,
    0xBF80,
    0x7F7F,
    0xFF7F,
    0x7F80,
    0xFF80,
    0x7FC0,
    0x7F81,
]


def vectors():
    """Records of 16 pairs a, 16 pairs b and 16 floats c: random bits, near values, and special ones with each other."""
    random = np.random.default_rng(0)
    bits = random.integers(0, 2**32, (4000, 3, LANES), dtype=np.uint32)
    near = random.normal(size=(4000, 5, LANES)).astype(np.float32).view(np.uint32) >> 16
    ordinary = np.stack([near[:, 0] | near[:, 1] << 16, near[:, 2] | near[:, 3] << 16, near[:, 4] << 16], axis=1)
    halves = random.choice(np.array(SPECIAL, np.uint32), (4000, 6, LANES))
    special = halves[:, :3] | halves[:, 3:] << 16
    tiny = random.integers(0x0080, 0x2000, (4000, 6, LANES), dtype=np.uint32)  # sums that become subnormal
    small = tiny[:, :3] | tiny[:, 3:] << 16
    return np.concatenate([bits, ordinary, special, small]).astype(np.uint32)


@pytest.fixture
def program(tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    generated = tmp_path / "levels.h"
    generated.write_text("#pragma once\n#define IPT_FAST_COMPILED_LEVELS avx512_bf16\n")

    def run(*flags):
        target, source = tmp_path / f"dots{len(flags)}", ROOT / "tests/build/dots.cpp"
        definitions = ["-DIPT_FAST_LEVEL=avx512_bf16", '-DIPT_FAST_VECTORS="vec_avx512_bf16.h"']
        command = ["g++", "-std=c++20", "-O2", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/cpu'}", f"-I{tmp_path}"]
        subprocess.run([*command, *definitions, *AVX512, *flags, source, "-o", target], check=True)
        given, found = tmp_path / "in", tmp_path / f"out{len(flags)}"
        vectors().tofile(given)
        subprocess.run([target, given, found], check=True)
        record = np.dtype([("sum", np.uint32, LANES), ("factor", np.uint16, LANES), ("pairs", np.uint32, LANES)])
        return np.fromfile(found, record)

    return run


@pytest.mark.skipif(
    not _extension.load() or "avx512_bf16" not in torch.ops.ipt_fast_cpu.isa_levels(),
    reason="this processor has no AVX512_BF16 instructions",
)
def test_the_emulation_is_the_instruction(program):
    emulated, real = program(), program("-mavx512bf16")
    assert len(real) == len(vectors())
    assert (emulated["factor"] == real["factor"]).all()
    assert (emulated["pairs"] == real["pairs"]).all()
    differ = emulated["sum"] != real["sum"]
    nan = [np.isnan(values["sum"].view(np.float32)) for values in (emulated, real)]
    assert (nan[0] == nan[1]).all()
    assert not (differ & ~nan[0]).any(), vectors()[differ.any(1)][:2]


@pytest.mark.slow
@pytest.mark.skipif(
    not _extension.load() or "avx512" not in torch.ops.ipt_fast_cpu.isa_levels(), reason="this processor has no AVX-512"
)
def test_the_level_by_emulation(tmp_path):
    """Every operator at the level avx512_bf16, compiled without its instructions."""
    checkout = copy_sources(tmp_path / "checkout")
    build = UNSET | {"IPT_FAST_BUILD": "cpu", "CMAKE_ARGS": "-DIPT_FAST_EMULATE=ON", "PYTHONPATH": "."}
    succeed(sys.executable, "setup.py", "-q", "build_ext", "--inplace", cwd=checkout, timeout=3000, **build)
    tests = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/ops/test_levels.py", "-k", "avx512_bf16")
    assert " passed" in succeed(sys.executable, *tests, cwd=checkout, timeout=3000, OMP_NUM_THREADS="1", PYTHONPATH=".")
