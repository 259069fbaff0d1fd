import pytest
import torch

from tests.ops import cases


@pytest.fixture(autouse=True)
def on_the_gpu(monkeypatch):
    """Calls are built on the GPU."""
    if not torch.cuda.is_available():
        pytest.fail("the tests marked gpu need an NVIDIA GPU that PyTorch can use")
    monkeypatch.setattr(cases, "DEVICE", "cuda")
