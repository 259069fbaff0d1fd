"""Cross-covariance attention, accelerated: timm's, of tokens, and DITN's, of windows."""

import pytest
import torch
import torch.fx

import ipt_fast
from tests.acceleration.comparison import assert_same, randomised
from tests.oracles.public import public_module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_tokens(dtype):
    attention = public_module("timm.models.xcit").XCA(48, num_heads=4, qkv_bias=True)
    assert_same(randomised(attention), (2, 37, 48), dtype, {"XCiT attention"})


def test_symbolic_tracing_sees_the_plain_module():
    model = torch.nn.Sequential(randomised(public_module("timm.models.xcit").XCA(48, num_heads=4))).eval()
    x = torch.rand(2, 37, 48)
    expected, graph = model(x), torch.fx.symbolic_trace(model).graph
    assert ipt_fast.accelerate(model, example=x).accelerated
    traced = torch.fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes] == [node.target for node in graph.nodes]
    assert torch.equal(traced(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_windows(dtype):
    attention = public_module("spandrel.architectures.DITN.__arch.DITN_Real").ISA(60, bias=True)
    assert_same(randomised(attention), (3, 60, 8, 8), dtype, {"DITN attention"})
