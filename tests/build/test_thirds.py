"""Products of float32 by thirds, under sanitizers: within their memory, whatever the sizes, and as exact as FMAs."""

import shutil
import subprocess

import pytest
import torch

from ipt_fast import _extension
from tests.build.test_dots import AVX512, ROOT


@pytest.mark.skipif(
    not _extension.load() or "avx512" not in torch.ops.ipt_fast_cpu.isa_levels(),
    reason="this processor has no AVX-512 instructions",
)
@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_products_of_any_size(tmp_path):
    (tmp_path / "levels.h").write_text("#pragma once\n#define IPT_FAST_COMPILED_LEVELS avx512_bf16\n")
    definitions = ["-DIPT_FAST_LEVEL=avx512_bf16", '-DIPT_FAST_VECTORS="vec_avx512_bf16.h"']
    folders = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/cpu'}", f"-I{tmp_path}"]
    checked = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    source, target = ROOT / "tests/build/thirds.cpp", tmp_path / "thirds"
    subprocess.run(
        ["g++", "-std=c++20", "-O2", *AVX512, *definitions, *folders, *checked, source, "-o", target], check=True
    )
    done = subprocess.run([target], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    error, of_fp32 = map(float, done.stdout.split())
    assert error <= 2 * of_fp32
