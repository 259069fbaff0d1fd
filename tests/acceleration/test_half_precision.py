"""Models whose 16 bit fails in plain PyTorch run there, accelerated."""

import copy

import pytest
import torch

import ipt_fast
from ipt_fast.acceleration.verify import largest_error
from tests.acceleration.architectures import LIGHT, SPANDREL, build
from tests.acceleration.small import without_convolutions


def test_scores_beyond_the_range_of_float16():
    """Queries and keys of some hundreds: their products overflow in float16, whose softmax is no number then."""
    model = build(SPANDREL, "SwinIR", **LIGHT | dict(depths=(1,), img_size=16, upscale=2), upsampler="pixelshuffle")
    attention = model.layers[0].residual_group.blocks[0].attn
    with torch.no_grad():
        attention.qkv.weight[: 2 * attention.dim] *= 400
    x = torch.rand(2, 3, 16, 16)
    half = copy.deepcopy(model).half()
    with torch.no_grad():
        assert model(x).isfinite().all() and model(x).abs().max() < 100
        assert half(x.half()).isnan().any()
        truth = copy.deepcopy(half).double()(x.half().double())
        report = ipt_fast.accelerate(half, example=x.half())
        out = half(x.half())
    assert out.isfinite().all() and len(without_convolutions(report.accelerated)) == 1
    assert largest_error(out, truth) == pytest.approx(report.whole.error, rel=1e-6)
    assert report.whole.error <= report.whole.allowed < 0.2, str(report)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masks_that_the_plain_model_makes_in_float32(dtype):
    """At every size but that of its training, SwinIR makes masks in float32, which its products do not take."""
    model = build(SPANDREL, "SwinIR", **LIGHT, upscale=2, upsampler="pixelshuffledirect")
    x = torch.rand(1, 3, 8, 16)
    half = copy.deepcopy(model).to(dtype)
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="same dtype"):
            half(x.to(dtype))
        report = ipt_fast.accelerate(half, example=x.to(dtype))
        assert half(x.to(dtype)).dtype == dtype
    assert len(without_convolutions(report.accelerated)) == 2 and report.whole.error <= report.whole.allowed


def test_what_float32_cannot_do_either_is_refused():
    model = build(SPANDREL, "SwinIR", **LIGHT, upscale=2, upsampler="pixelshuffledirect").half()
    with torch.no_grad():
        model.layers[0].residual_group.blocks[0].mlp.fc2.bias += 60000
        model.layers[0].residual_group.blocks[1].mlp.fc2.bias += 60000
    with pytest.raises(ValueError, match=r"blocks\.1 .*has an error of inf"):
        ipt_fast.accelerate(model, example=torch.rand(1, 3, 8, 16).half())
