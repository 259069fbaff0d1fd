"""Plain dense convolutions, accelerated: which of them, what their results are, and what is left to PyTorch."""

import copy
from unittest import mock

import pytest
import torch
from torch import nn

import ipt_fast
from ipt_fast import _extension, ops
from tests.acceleration.architectures import SPANDREL, build
from tests.acceleration.comparison import randomised
from tests.acceleration.small import swinir
from tests.modules.changed import assert_close
from tests.oracles.public import public_module

MAP = (1, 32, 33, 34)  # larger than what is left to PyTorch


def accelerated_paths(model):
    return [row.path for row in ipt_fast.accelerate(model, verify=False).rows]


def conv(**changes):
    return nn.Conv2d(**{"in_channels": 32, "out_channels": 40, "kernel_size": 3, "padding": 1, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"kernel_size": 5, "padding": 2}, {"padding": 0}, {"stride": 2}, {"dilation": 2, "padding": 2}, {"groups": 2},
        {"padding_mode": "reflect"}, {"in_channels": 3}, {"out_channels": 12}, {"padding": "same"},
    ],
)  # fmt: skip
def test_other_convolutions_are_no_news(changes):
    report = ipt_fast.accelerate(nn.Sequential(conv(**changes)), verify=False)
    assert report.rows == []


def test_bfloat16_is_left():
    model = nn.Sequential(conv())
    assert accelerated_paths(copy.deepcopy(model).bfloat16()) == []
    plain, x = copy.deepcopy(model).bfloat16(), torch.randn(MAP).bfloat16()
    assert accelerated_paths(model) == ["0"]
    with torch.no_grad():
        assert torch.equal(model.bfloat16()(x), plain(x))


def test_subclasses_are_left():
    class Conv2d(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    assert accelerated_paths(nn.Sequential(Conv2d(32, 32, 3, padding=1))) == []


@pytest.mark.skipif(not _extension.load(), reason=str(_extension.error()))
@pytest.mark.parametrize(
    ("shape", "dtype", "operator"),
    [
        (MAP, torch.float32, True), (MAP, torch.float16, True), (MAP[1:], torch.float32, False),
        ((1, 32, 16, 16), torch.float32, False), ((4, 32, 16, 16), torch.float32, True),
    ],
)  # fmt: skip
@pytest.mark.parametrize("bias", [True, False])
def test_what_runs_on_the_operator(shape, dtype, operator, bias):
    model = nn.Sequential(conv(bias=bias).to(dtype))
    expected = copy.deepcopy(model)
    assert accelerated_paths(model) == ["0"]
    x = torch.randn(shape, dtype=dtype)
    with torch.no_grad(), mock.patch.object(ops, "dense_convolution", wraps=ops.dense_convolution) as called:
        found, truth = model(x).double(), expected.double()(x.double())
    assert (found - truth).abs().max() <= max(4 * torch.finfo(dtype).eps, 2e-5) * truth.abs().max()
    assert called.call_count == operator


@pytest.mark.parametrize("channels", [31, 33])
def test_a_map_of_other_channels_is_refused_as_by_pytorch(channels):
    model, x = nn.Sequential(conv()), torch.randn(1, channels, 33, 34)
    with torch.no_grad(), pytest.raises(RuntimeError, match="expected input") as plain:
        model(x)
    assert accelerated_paths(model) == ["0"]
    with torch.no_grad(), pytest.raises(RuntimeError) as found:
        model(x)
    assert str(found.value) == str(plain.value)


@pytest.mark.parametrize("training", [False, True])
def test_gradients(training):
    model = nn.Sequential(conv(), nn.ReLU(), conv(in_channels=40)).train(training)
    plain = copy.deepcopy(model)
    assert accelerated_paths(model) == ["0", "2"]
    x = torch.randn(MAP)
    for each in (model, plain):
        each(x).square().sum().backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert (ours.grad - theirs.grad).abs().max() <= 1e-4 * theirs.grad.abs().max()


def test_what_a_rule_computes_is_not_swapped_beside_it():
    """The three convolutions inside a block of SPAN are merged by its rule; those inside HAT's blocks are called."""
    span = build(SPANDREL, "SPAN", num_in_ch=3, num_out_ch=3, feature_channels=48, upscale=2)
    report = ipt_fast.accelerate(span, verify=False)
    inside = [row.path for row in report.rows if row.rule == "SPAN convolution"]
    convolutions = [row.path for row in report.rows if row.rule == "dense convolution"]
    assert inside and not any(path.startswith(f"{block}.") for path in convolutions for block in inside)


def test_a_changed_convolution_is_called_as_it_is():
    model = swinir()
    report = ipt_fast.accelerate(model, verify=False)
    path = next(row.path for row in report.rows if row.rule == "dense convolution")
    part, x = model.get_submodule(path), torch.randn(1, 60, 32, 32)
    part.register_forward_hook(lambda module, args, out: 2 * out)
    with torch.no_grad():
        twice = part(x)
        report.undo()
        assert_close(twice, part(x))  # still with the hook


def test_a_network_of_convolutions():
    compact = public_module(f"{SPANDREL}.Compact.__arch.SRVGG").SRVGGNetCompact
    model = randomised(compact(num_in_ch=3, num_out_ch=3, num_feat=32, num_conv=3, upscale=2, act_type="prelu"))
    plain, x = copy.deepcopy(model), torch.rand(1, 3, 40, 37)
    report = ipt_fast.accelerate(model, example=x)
    assert [row.rule for row in report.rows] == ["dense convolution"] * 3
    assert report.whole.error <= report.whole.allowed
    with torch.no_grad():
        assert_close(model(x), plain(x))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_layout_is_that_of_the_plain_module(layout):
    model, x = nn.Sequential(conv()), torch.randn(2, *MAP[1:]).to(memory_format=layout)
    with torch.no_grad():
        plain = model(x)
        assert accelerated_paths(model) == ["0"] and model(x).stride() == plain.stride()
        assert model.to(memory_format=torch.channels_last)(x).is_contiguous(memory_format=torch.channels_last)


def test_a_model_of_convolutions_that_cannot_be_verified_is_left():
    class Two(nn.Sequential):
        def forward(self, x, scale):
            return super().forward(x) * scale

    model = Two(conv())
    (row,) = ipt_fast.accelerate(model).rows
    assert row.rule is None and "does not run on the example" in row.reason and type(model[0]) is nn.Conv2d


def test_convolutions_raise_no_flag():
    class Descriptor:
        supports_half = supports_bfloat16 = False
        model = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), conv())

    assert ipt_fast.accelerate(Descriptor, example=torch.rand(1, 3, 40, 40)).accelerated
    assert not Descriptor.supports_half


@pytest.mark.skipif(not _extension.load(), reason=str(_extension.error()))
@pytest.mark.parametrize("frozen", ["input", "weight", None])
def test_gradients_that_nobody_wants_are_not_computed(frozen):
    model, x = nn.Sequential(conv()), torch.randn(MAP, requires_grad=frozen != "input")
    model[0].weight.requires_grad_(frozen != "weight")
    accelerated_paths(model)
    with mock.patch.object(ops, "dense_convolution", wraps=ops.dense_convolution) as operator:
        model(x)
    assert operator.called == (frozen is None)
