"""Schedules of the Triton kernels that are not the default, which a tuned file may choose."""

import sys

import pytest
import torch

import ipt_fast
from tests.ops.cases import assert_all_within_rule, baseline, build, exact, forward_and_gradients
from tests.ops.test_parity import gradient_of_output, runnable

LAYER = "focal_attention_layer"


@pytest.mark.parametrize(
    ("call", "dtype"), [(LAYER, torch.float32), (f"{LAYER}/modulated", torch.float16)], ids=["fp32", "modulated-fp16"]
)
def test_the_depthwise_convolution_within_the_focal_layer(call, dtype, monkeypatch):
    chosen, results = [], []
    for shape in (1, 5, 7), (1, 11, 6):
        operator, tensors, options = build(call, shape, dtype)
        if "triton" not in runnable(operator, tensors, options):
            pytest.skip("Triton does not run here")
        kernels = sys.modules["ipt_fast.kernels.focal_attention_layer"]
        configured = kernels.config

        def config(name, key, candidates, device, configured=configured):
            if name != LAYER:
                return configured(name, key, candidates, device)
            chosen.append(candidates[1])
            return candidates[1]

        grad = gradient_of_output(operator, tensors, options)
        truth, base = exact(operator, tensors, options, grad), baseline(operator, tensors, options, grad)
        with monkeypatch.context() as patched, ipt_fast.use_backend("triton"):
            patched.setattr(kernels, "config", config)
            got = forward_and_gradients(getattr(ipt_fast.ops, operator), tensors, options, grad)
        results.append((got, truth, base))
    assert chosen == [{"FUSED": True}] * 2
    assert_all_within_rule(results)
