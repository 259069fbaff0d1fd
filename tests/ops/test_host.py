"""What the Triton kernels' host code does by itself, on tensors without memory."""

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
