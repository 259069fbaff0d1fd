"""The input on which accelerate() verifies a model, and what is left of that afterwards."""

import pytest
import torch

import ipt_fast
from tests.acceleration.architectures import SPANDREL, build
from tests.acceleration.small import runs, swinir

SIZE = torch.Size([1, 3, 8, 16])


def test_channels_are_found_where_the_first_convolution_takes_others():
    """It stands behind a pixel-unshuffle, or is registered before the one that sees the image."""
    assert ipt_fast.accelerate(swinir(start_unshuffle=2)).accelerated
    assert ipt_fast.accelerate(build(SPANDREL, "OmniSR", num_feat=16, res_num=1, up_scale=2)).accelerated


@pytest.mark.parametrize(
    ("example", "error", "said"),
    [
        (torch.zeros(SIZE, dtype=torch.uint8), TypeError, "uint8"),
        (torch.zeros(SIZE).numpy(), TypeError, "ndarray"),
        (torch.zeros(SIZE, dtype=torch.bfloat16), ValueError, "bfloat16"),
        (torch.full(SIZE, float("nan")), ValueError, "finite"),
    ],
)
def test_an_example_that_does_not_serve(models, example, error, said):
    plain, *_ = models
    with pytest.raises(error, match=f"example must .*{said}"):
        ipt_fast.accelerate(plain, example=example)
    assert runs(plain) == [False, False]


def test_what_a_plain_module_writes_while_it_is_verified_is_taken_back():
    """SPAN's convolutions write their merged form in evaluation."""
    model = build(SPANDREL, "SPAN", num_in_ch=3, num_out_ch=3, feature_channels=8).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert ipt_fast.accelerate(model).accelerated and model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_report_undoes_once(models):
    plain, _, _, x = models
    first = ipt_fast.accelerate(plain, example=x)
    first.undo()
    ipt_fast.accelerate(plain, example=x)
    first.undo()
    assert runs(plain) == [True, True]
