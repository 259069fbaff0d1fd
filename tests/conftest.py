import pytest
import torch


@pytest.fixture(autouse=True)
def reproducible(monkeypatch):
    """The same numbers in every run, and no backend demanded from outside."""
    monkeypatch.delenv("IPT_FAST_BACKEND", raising=False)
    # Plain PyTorch, with which GPU tests compare, computes float32 in float32.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
