"""The CUDA library, built by nvcc for GPUs that are not here: what is in it, and that it loads without one."""

import collections
import functools
import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
pytestmark = pytest.mark.skipif(NVCC is None, reason="there is no nvcc")
# Kernels whose products are on the tensor cores, and those that read or write images in pieces of 16 bytes.
PRODUCTS = ("leffn_kernel", "focal_gram_kernel", "focal_apply_kernel", "grid_attention_layer_kernel", "merge_kernel")
IMAGES = ("leffn_kernel", "focal_gram_kernel", "focal_apply_kernel", "grid_attention_layer_kernel")
OUTPUTS = ("leffn_kernel", "focal_apply_kernel", "grid_attention_layer_kernel")
# Where a lane has 8 neighbouring bytes, not 16.
HALVES = re.compile("(leffn|grid_attention_layer)_kernelINS0_4(bf|fp)16ELi48E")


@pytest.fixture(scope="module", params=["9.0a", pytest.param("8.0", marks=pytest.mark.slow)])
def architecture(request):
    return request.param


@pytest.fixture(scope="module")
def library(tmp_path_factory, architecture):
    folder = tmp_path_factory.mktemp("cuda")
    wanted = {
        "IPT_FAST_BUILD": "cuda",
        "TORCH_CUDA_ARCH_LIST": architecture,
        "CXXFLAGS": "-Werror",
        "CUDAFLAGS": "-Werror=all-warnings -Xptxas=-Werror",  # a spilled register is a warning
    }
    command = [
        sys.executable,
        "setup.py",
        "build_ext",
        "--build-lib",
        str(folder),
        "--build-temp",
        str(folder / "temp"),
    ]
    result = subprocess.run(command, cwd=ROOT, env={**os.environ, **wanted}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    (module,) = (folder / "ipt_fast").glob("_C_cuda*.so")
    return module


def disassembler():
    triton = pytest.importorskip("triton", reason="cuobjdump comes with Triton")
    return triton.knobs.nvidia.cuobjdump.path


@functools.cache
def functions(library, *options):
    """{kernel: text} of cuobjdump's output."""
    said = subprocess.run([disassembler(), *options, library], capture_output=True, text=True, check=True).stdout
    found, name = collections.defaultdict(list), None
    for line in said.splitlines():
        if re.search(r"arch = (sm_\w+)", line):
            name = None
        elif match := re.match(r"\s*Function ?:? (\w+)", line):
            name = match[1]
        if name:
            found[name].append(line)
    return {name: "\n".join(lines) for name, lines in found.items()}


def test_it_is_for_the_wanted_gpu(library, architecture):
    said = subprocess.run([disassembler(), "-lelf", library], capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"\bsm_\w+?(?=\.)", said)) == {f"sm_{architecture.replace('.', '')}"}


def test_no_kernel_needs_the_stack(library):
    found = functions(library, "-res-usage")
    assert found
    for key, text in found.items():
        registers, stack = (int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK"))
        assert registers <= 255 and stack == 0, (key, text)


def test_the_expected_instructions(library):
    found = functions(library, "-sass")
    for kernel in {*PRODUCTS, *IMAGES}:
        variants = {key: text for key, text in found.items() if kernel in key and re.search("bf16|fp16", key)}
        assert variants, kernel
        for key, text in variants.items():
            if kernel in PRODUCTS:
                assert "HMMA" in text, key
            if kernel in IMAGES:
                assert re.search(r"LDG(STS)?\.E\S*\.128", text), key


@pytest.mark.parametrize("kernel", OUTPUTS)
def test_no_store_to_an_image_is_split(library, kernel):
    found = {key: text for key, text in functions(library, "-sass").items() if kernel in key}
    assert found
    for key, text in found.items():
        stores, width = re.findall(r"STG\S*", text), ".64" if HALVES.search(key) else ".128"
        assert stores and all(width in store for store in stores), (key, stores)


@pytest.mark.skipif(shutil.which("nm") is None, reason="there is no nm")
def test_it_needs_the_stable_interfaces_alone(library):
    """Python's, and of PyTorch what 2.10 has: one library serves all versions since."""
    said = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True).stdout
    needed = {line.split()[-1] for line in said.splitlines() if "@" not in line and " w " not in line}
    torch_dir = pathlib.Path(importlib.util.find_spec("torch").origin).parent
    headers = [torch_dir / "include/torch/csrc" / name for name in ("stable/c/shim.h", "inductor/aoti_torch/c/shim.h")]
    newer = re.compile(r"#if TORCH_FEATURE_VERSION >= TORCH_VERSION_(?!2_10_).*?#endif", re.DOTALL)
    stable = {name for header in headers for name in re.findall(r"\w+", newer.sub("", header.read_text()))}
    assert needed - stable == {"PyModule_Create2"}
    assert library.name == "_C_cuda.abi3.so" or sysconfig.get_config_var("Py_GIL_DISABLED")


CODE = """
import json, os, sys
import torch
from ipt_fast import _extension
os.environ["IPT_FAST_EMULATED_CUDA"] = sys.argv[1]  # takes any library's place
assert _extension.cuda_error() is None, _extension.cuda_error()
operators = torch.ops.ipt_fast_cuda
x = torch.randn(1, 32, 4, 4).contiguous(memory_format=torch.channels_last)
weights = torch.randn(64, 32, 1, 1), torch.randn(64, 1, 5, 5), torch.randn(32, 64, 1, 1)
rest = 1e-5, True, False
calls = {
    "device": lambda: operators.leffn(x, *weights, False),
    "layout": lambda: operators.leffn(x.contiguous(), *weights, False),
    "dtype": lambda: operators.leffn(x.double(), *weights, False),
    "mixed": lambda: operators.leffn(x.bfloat16(), *weights, False),
    "small": lambda: operators.leffn_layer(x, torch.ones(32).half(), None, *weights, *rest),
    "alike": lambda: operators.leffn_layer(
        x.half(), torch.ones(32).half(), torch.ones(32), *(weight.half() for weight in weights), *rest
    ),
    "shape": lambda: operators.leffn(x, weights[0], weights[1][:32], weights[2], False),
    "pairs": lambda: operators.merge_pointwise(weights[0], weights[0], False),
    "doubles": lambda: operators.merge_pointwise(weights[0].double(), weights[2].double(), False),
    "flags": lambda: operators.merge_depthwise(*(torch.ones(2, 1, k, k) > 0 for k in (5, 3, 1)), True, False),
}
said = {}
for name, call in calls.items():
    try:
        call()
    except RuntimeError as error:
        said[name] = str(error)
print(json.dumps(said))
"""


def test_it_loads_without_a_gpu_and_refuses_bad_arguments(library):
    result = subprocess.run([sys.executable, "-c", CODE, str(library)], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)
    for name, words in {
        "device": "must be on one cuda device",
        "layout": "x must be channels-last",
        "dtype": "x must be float32, bfloat16 or float16",
        "mixed": "must have the dtype of the first tensor",
        "small": "norm_weight must be float32 or have the dtype of the first tensor",
        "alike": "norm_bias must have the dtype of the other small parameters",
        "shape": "depthwise_weight must have shape (64, 1, 5, 5); got (32, 1, 5, 5)",
        "pairs": "first must have shape (32, 32, 1, 1); got (64, 32, 1, 1)",
        "doubles": "first must be float32, bfloat16 or float16",
        "flags": "k5 must be float32, bfloat16 or float16",
    }.items():
        assert words in said.get(name, ""), (name, said.get(name))
