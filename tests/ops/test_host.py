"""What the Triton kernels' host code does by itself, on tensors without memory."""

import json
import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

_launch = pytest.importorskip("ipt_fast.kernels._launch", reason="Triton is not installed")


class Called(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operators = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operators.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "inner"), [(96, 4096), (4096, 96)])
def test_sums_over_pixels_are_made_in_fp32(dtype, rows, inner):
    a, b = torch.empty(rows, inner, dtype=dtype, device="meta"), torch.empty(inner, 48, dtype=dtype, device="meta")
    with Called() as called:
        y = _launch.matmul(a, b)
    assert y.dtype == dtype and y.shape == (rows, 48)
    long = inner > rows and dtype != torch.float32
    assert called.operators[0] == ("aten.mm.dtype" if long else "aten.mm.default")


def test_integers():
    for n in range(1, 70):
        assert (
            _launch.power_of_2(n) / 2 < n <= _launch.power_of_2(n) == 2 ** round(torch.tensor(n).log2().ceil().item())
        )
        assert all(_launch.cdiv(n, k) * k - k < n <= _launch.cdiv(n, k) * k for k in range(1, 20))


def test_what_was_measured_serves_gpus_of_the_same_kind(tmp_path, monkeypatch):
    """A GPU's own file, else one of its compute capability; configurations that are no candidates are not taken."""
    good, stale, default = dict(BLOCK=64, num_warps=4), dict(BLOCK=7), dict(BLOCK=32, num_warps=4)
    for name, capability, chosen in (
        ("NVIDIA_H200", [9, 0], good),
        ("Other", [8, 0], default),
        ("A_Old", [9, 0], stale),
    ):
        values = {"capability": capability, "kernels": {"k": {"bfloat16-96": chosen}}, "operators": {}}
        (tmp_path / f"{name}.json").write_text(json.dumps(values))
    monkeypatch.setattr(_launch, "CONFIGS", tmp_path)
    cuda = types.SimpleNamespace(type="cuda", index=0)
    for gpu, capability, expected in (
        ("NVIDIA H200", (9, 0), good),
        ("NVIDIA H100 80GB HBM3", (9, 0), good),
        ("A Old", (9, 0), default),
        ("NVIDIA A100", (8, 0), default),
        ("NVIDIA B200", (10, 0), default),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, gpu=gpu: gpu)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        _launch.measured_on.cache_clear()
        assert _launch.config("k", "bfloat16-96", [default, good], cuda) == expected, gpu
    _launch.measured_on.cache_clear()
