import pytest
import torch


@pytest.fixture(autouse=True)
def reproducible(monkeypatch):
    """The same numbers in every run, and no backend demanded from outside."""
    monkeypatch.delenv("IPT_FAST_BACKEND", raising=False)
    torch.manual_seed(0)
