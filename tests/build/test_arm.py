"""The CPU's kernels on 64-bit Arm: compiled as there, run under emulation, judged by the rule of tests/ops."""

import itertools
import math
import os
import shutil
import struct
import sysconfig

import pytest
import torch

from tests.build.building import ROOT, run, succeed
from tests.ops.cases import assert_within_rule, baseline, exact
from tests.ops.test_levels import DTYPES, large
from tests.ops.test_parity import gradient_of_output

COMPILER, EMULATOR = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
LEVELS = {"generic": [], "neon": [], "neon_bf16": ["-march=armv8.2-a+bf16"]}  # with their flags in levels.cmake
FLAGS = ["-std=c++20", "-O2", "-fno-math-errno", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-static"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not COMPILER, reason="no aarch64-linux-gnu-g++ (Debian: g++-aarch64-linux-gnu)"),
    pytest.mark.skipif(not EMULATOR, reason="no qemu-aarch64 (Debian: qemu-user)"),
]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of a build of the kernels, configured as on an Arm machine; PyTorch and Python are not linked."""
    folder = tmp_path_factory.mktemp("arm")
    options = {
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": "aarch64",
        "CMAKE_CXX_COMPILER": COMPILER,
        "CMAKE_BUILD_TYPE": "Release",
        "PYTHON_INCLUDE_DIR": sysconfig.get_path("include"),
        "TORCH_DIR": "/nowhere",
        "TORCH_VERSION": torch.__version__,
        "TORCH_CXX11_ABI": 1,
    }
    definitions = (f"-D{name}={value}" for name, value in options.items())
    path = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"
    succeed("cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", *definitions, PATH=path)
    succeed("cmake", "--build", folder, "--target", *(f"kernels_{level}" for level in LEVELS), PATH=path, timeout=3000)
    return folder


def compile_program(built, name, *options):
    program = built / name
    include = ["-I", ROOT / "csrc", "-I", ROOT / "csrc/cpu", "-I", built / "generated"]
    succeed(COMPILER, *FLAGS, *include, ROOT / f"tests/build/arm/{name}.cpp", *options, "-o", program)
    return program


@pytest.fixture(scope="module")
def kernels(built):
    """The program that calls an operator's kernels, statically linked."""
    return compile_program(built, "kernels", *built.glob("csrc/cpu/CMakeFiles/kernels_*.dir/*.o"))


def test_levels(built):
    """The levels of this family of processors, and no other's."""
    header = (built / "generated/levels.h").read_text()
    assert f"#define IPT_FAST_COMPILED_LEVELS {', '.join(LEVELS)}\n" in header


@pytest.mark.parametrize("level", LEVELS)
def test_vectors(built, level):
    defined = {"LEVEL": level, "VECTORS": f'"vec_{level}.h"', "FUSED": int(level != "generic")}
    options = (f"-DIPT_FAST_{name}={value}" for name, value in defined.items())
    program = compile_program(built, "vectors", *LEVELS[level], *options)
    process = run(EMULATOR, "-cpu", "max", program)
    assert process.returncode == 0 and process.stdout == "0 failures\n", process.stdout


def pixels(x):
    """A map as the kernels read it, channels last."""
    return x.permute(0, 2, 3, 1)


def padded(x, axes=1):
    """float32, the last axes padded to whole vectors with zeros."""
    ends = ((0, -size % 16) for size in reversed(x.shape[x.dim() - axes :]))
    return torch.nn.functional.pad(x.float(), tuple(itertools.chain.from_iterable(ends)))


class Results:
    """The arrays that the program wrote, one behind the other."""

    def __init__(self, data):
        self.data = data

    def take(self, dtype, *shape):
        size = math.prod(shape) * dtype.itemsize
        found, self.data = self.data[:size], self.data[size:]
        return torch.frombuffer(found, dtype=dtype).view(shape)

    def take_map(self, dtype, batch, channels, height, width):
        return self.take(dtype, batch, height, width, channels).permute(0, 3, 1, 2)


def call(kernels, level, operator, numbers, arrays):
    """Arrays are tensors in the order of their axes."""
    raw = [each.contiguous().view(torch.uint8).numpy().tobytes() if each.numel() else b"" for each in arrays]
    sent = b"".join(
        [struct.pack(f"<{len(numbers)}q", *numbers), *(struct.pack("<q", len(each)) + each for each in raw)]
    )
    command = [EMULATOR, "-cpu", "max", kernels, level, operator]
    process = run(*command, input=sent, text=False)
    assert process.returncode == 0, process.stderr
    return Results(bytearray(process.stdout))


def layer_norm_2d(send, x, weight, bias=None, *, eps, centered, grad):
    batch, channels, height, width = x.shape
    bias = torch.zeros_like(weight) if bias is None else bias
    numbers = [DTYPES.index(x.dtype), batch, channels, height * width, int(centered)]
    results = send("layer_norm_2d", numbers, [pixels(x), padded(weight), padded(bias), pixels(grad)])
    out, grad_x = (results.take_map(x.dtype, *x.shape) for _ in range(2))
    sums = (results.take(torch.float64, padded(weight).numel())[:channels].to(x.dtype) for _ in range(2))
    return {"out": out, "x": grad_x, **dict(zip(("weight", "bias"), sums, strict=True))}


def leffn(send, x, expand_weight, depthwise_weight, project_weight, norm_weight=None, norm_bias=None, *, grad, **_):
    """leffn and its gradients; with a norm leffn_layer's output."""
    batch, channels, height, width = x.shape
    hidden, out, kernel = len(expand_weight), len(project_weight), depthwise_weight.shape[3]
    numbers = [DTYPES.index(x.dtype), batch, height, width, channels, hidden, out, kernel]
    taps = padded(depthwise_weight.flatten(1).t())  # (taps, padded hidden)
    layer = norm_weight is not None
    norm = [padded(each) for each in (norm_weight, norm_bias)] if layer else [torch.zeros(0)] * 2
    weights = [expand_weight, project_weight, taps.view(kernel**2, -1, 16).transpose(0, 1)]
    results = send("leffn", [*numbers, int(layer)], [pixels(x), *norm, *weights])
    found = {"out": results.take_map(x.dtype, batch, out, height, width)}
    if layer:
        return found
    project = padded(project_weight.flatten(1))
    weights = [padded(expand_weight.flatten(1), axes=2), project, taps, taps.flip(0)]
    results = send("leffn_backward", numbers, [pixels(x), pixels(grad), *weights])
    found["x"] = results.take_map(x.dtype, *x.shape)
    found["expand_weight"] = results.take(torch.float32, *weights[0].shape)[:hidden, :channels, None, None]
    found["depthwise_weight"] = results.take(torch.float32, *taps.shape).t()[:hidden].reshape(hidden, 1, kernel, kernel)
    found["project_weight"] = results.take(torch.float32, *project.shape)[:, :hidden, None, None]
    return {name: value.to(x.dtype) for name, value in found.items()}


def channel_attention(send, q, k, v, temperature, *, num_heads, window_size, grad):
    batch, channels, height, width = q.shape
    heads = [num_heads, channels // num_heads, window_size]
    numbers = [DTYPES.index(q.dtype), 1, batch, height, width, *heads]
    arrays = [pixels(torch.cat([q, k, v], 1)), pixels(grad), temperature.float(), *[torch.zeros(0)] * 3]
    results = send("channel_attention", numbers, arrays)
    out = results.take_map(q.dtype, *q.shape)
    grads = results.take_map(q.dtype, batch, 3 * channels, height, width).chunk(3, 1)
    return {"out": out, **dict(zip("qkv", grads, strict=True))}


def focal_channel_attention(
    send, qkv, temperature, token_weight, top_weight, bottom_weight, *, num_heads, window_size, grad
):
    batch, channels, height, width = grad.shape
    heads = [num_heads, channels // num_heads, window_size]
    numbers = [DTYPES.index(qkv.dtype), 2, batch, height, width, *heads]
    weights = [1 / temperature.float(), token_weight.float() ** 2, top_weight.float(), bottom_weight.float()]
    results = send("channel_attention", numbers, [pixels(qkv), pixels(grad), *weights])
    return {"out": results.take_map(qkv.dtype, *grad.shape), "qkv": results.take_map(qkv.dtype, *qkv.shape)}


def grid_attention(send, qkv, bias_table=None, *, num_heads, grid_size, grad):
    batch, channels, height, width = grad.shape
    rows = 2 * grid_size - 1
    used = rows * (rows + 16)
    bias = torch.zeros(num_heads, used + -used % 16)
    if bias_table is not None:
        table = bias_table.float().view(rows, rows, num_heads).permute(2, 0, 1) * math.log2(math.e)
        bias[:, :used].view(num_heads, rows, -1)[..., :rows] = table
    numbers = [DTYPES.index(qkv.dtype), batch, height, width, num_heads, channels // num_heads, grid_size]
    results = send("grid_attention", numbers, [pixels(qkv), pixels(grad), bias])
    found = {"out": results.take_map(qkv.dtype, *grad.shape), "qkv": results.take_map(qkv.dtype, *qkv.shape)}
    sums = results.take(torch.float64, *bias.shape)[:, :used].view(num_heads, rows, -1)[..., :rows]
    of_table = sums.permute(1, 2, 0).reshape(-1, num_heads)
    return found if bias_table is None else found | {"bias_table": of_table.to(bias_table.dtype)}


CALLED = {
    "layer_norm_2d": layer_norm_2d,
    "layer_norm_2d/bias_free": layer_norm_2d,
    "leffn": leffn,
    "leffn/3x3": leffn,
    "leffn_layer": leffn,
    "channel_attention/windows": channel_attention,
    "focal_channel_attention": focal_channel_attention,
    "focal_channel_attention/odd_window": focal_channel_attention,
    "grid_attention": grid_attention,
    "grid_attention/no_bias": grid_attention,
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CALLED)
def test_kernels(kernels, name, dtype, level):
    operator, tensors, options = large(name, dtype)
    grad = gradient_of_output(operator, tensors, options)

    def send(*arguments):
        return call(kernels, level, *arguments)

    found = CALLED[name](send, **tensors, **options, grad=grad)
    found = {argument: value for argument, value in found.items() if argument in ("out", *tensors)}
    truth, base = exact(operator, tensors, options, grad), baseline(operator, tensors, options, grad)
    assert_within_rule(found, truth, base)
