"""ECBSR, accelerated: the branches of its blocks, merged in every call."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ipt_fast
from tests.acceleration.comparison import assert_same, randomised

SOBEL = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
LAPLACE = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])


class SeqConv3x3(nn.Module):
    """A 1 x 1 convolution, and then one of 3 x 3 or of an edge in each channel (Zhang et al., 2021, eq. 4 to 8)."""

    def __init__(self, inputs, outputs, middle=None, edge=None):
        super().__init__()
        self.groups = 1 if edge is None else outputs
        self.k0, self.b0 = self.made(middle or outputs, inputs, 1, 1), self.made(middle or outputs)
        if edge is None:
            self.k1, self.b1 = self.made(outputs, middle, 3, 3), self.made(outputs)
        else:
            self.scale, self.bias = self.made(outputs, 1, 1, 1), self.made(outputs)
            self.mask = nn.Parameter(edge.repeat(outputs, 1, 1, 1), requires_grad=False)

    @staticmethod
    def made(*shape):
        return nn.Parameter(torch.zeros(shape))

    def forward(self, x):
        """The border of the map between is the first bias."""
        y = F.conv2d(F.pad(x, (1, 1, 1, 1)), self.k0, self.b0)
        weight, bias = (self.k1, self.b1) if self.groups == 1 else (self.scale * self.mask, self.bias)
        return F.conv2d(y, weight, bias, groups=self.groups)


class ECB(nn.Module):
    def __init__(self, inputs, outputs, act_type="prelu", with_idt=False):
        super().__init__()
        self.act_type, self.with_idt = act_type, with_idt and inputs == outputs
        self.conv3x3 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv1x1_3x3 = SeqConv3x3(inputs, outputs, 2 * outputs)
        self.conv1x1_sbx = SeqConv3x3(inputs, outputs, edge=SOBEL)
        self.conv1x1_sby = SeqConv3x3(inputs, outputs, edge=SOBEL.T)
        self.conv1x1_lpl = SeqConv3x3(inputs, outputs, edge=LAPLACE)
        if act_type != "linear":
            self.act = dict(prelu=nn.PReLU(outputs), relu=nn.ReLU(inplace=True))[act_type]

    def forward(self, x):
        y = self.conv3x3(x) + self.conv1x1_3x3(x) + self.conv1x1_sbx(x) + self.conv1x1_sby(x) + self.conv1x1_lpl(x)
        y = y + x if self.with_idt else y
        return y if self.act_type == "linear" else self.act(y)


class ECBSR(nn.Module):
    def __init__(self, channels, blocks, scale):
        super().__init__()
        inner = [ECB(channels, channels, with_idt=True) for _ in range(blocks)]
        self.scale, self.upsampler = scale, nn.PixelShuffle(scale)
        self.backbone = nn.Sequential(ECB(1, channels), *inner, ECB(channels, scale**2, "linear", with_idt=True))

    def forward(self, x):
        return self.upsampler(self.backbone(x) + x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [False, True])
def test_merged_branches(training, dtype):
    assert_same(randomised(ECBSR(16, 2, 2)), (2, 1, 7, 9), dtype, {"ECBSR block"}, training)


@pytest.mark.parametrize(
    ("act_type", "with_idt", "inputs"), [("relu", False, 16), ("linear", True, 16), ("relu", True, 3)]
)
def test_a_block(act_type, with_idt, inputs):
    assert_same(randomised(ECB(inputs, 16, act_type, with_idt)), (2, inputs, 5, 1), torch.float32, {"ECBSR block"})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda block: setattr(block, "conv1x1_kirsch", SeqConv3x3(16, 16, edge=SOBEL)), "it has other branches"),
        (lambda block: setattr(block.conv3x3, "stride", (2, 2)), "its plain convolution has another kernel"),
        (lambda block: delattr(block.conv1x1_lpl, "mask"), "it has no attribute mask"),
        (lambda block: setattr(block, "conv1x1_3x3", SeqConv3x3(16, 8, 4)), "its squeezing has a weight of"),
    ],
)
def test_what_does_not_fit_is_left(change, reason):
    block = ECB(16, 16)
    change(block)
    (row,) = ipt_fast.accelerate(block, verify=False).rows
    assert row.rule is None and row.reason.startswith(reason)
