"""The gate of a layer's branch."""

import pytest
import torch

from tests.ops.cases import assert_within_rule, baseline, build, exact
from tests.ops.test_parity import gradient_of_output, on_backend, runnable


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("call", ["leffn_layer", "focal_attention_layer", "grid_attention_layer"])
def test_a_gate_of_zero(call, dtype):
    """As training begins: the layer is the identity, and yet its gate has a gradient."""
    operator, tensors, options = build(f"{call}/modulated", (2, 7, 9), dtype)
    tensors["gate"] = torch.zeros_like(tensors["gate"])
    grad = gradient_of_output(operator, tensors, options)
    truth, base = exact(operator, tensors, options, grad), baseline(operator, tensors, options, grad)
    for backend in runnable(operator, tensors, options):
        got = on_backend(backend, operator, tensors, options, grad)
        assert_within_rule(got, truth, base)
        assert torch.equal(got["out"], tensors["x"]) and got["gate"].any()
