"""FDAT, accelerated: windows and channels; sizes of whole windows and others, where pixels of zeros take part."""

import pytest
import torch

import ipt_fast
from tests.acceleration.comparison import assert_same, randomised
from tests.oracles.public import public_module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(16, 24), (9, 13)])
def test_windows_and_channels(size, dtype):
    fdat = public_module("spandrel.architectures.FDAT.__arch.fdat").FDAT
    depth = dict(num_groups=1, depth_per_group=1, drop_path_rate=0.0)
    model = randomised(fdat(scale=2, upsampler_type="pixelshuffledirect", **depth))
    assert_same(model, (2, 3, *size), dtype, {"FDAT block"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exported_windows_take_other_widths(dtype):
    fdat = public_module("spandrel.architectures.FDAT.__arch.fdat").FDAT
    depth = dict(num_groups=1, depth_per_group=1, drop_path_rate=0.0)
    block = randomised(fdat(scale=2, upsampler_type="pixelshuffledirect", **depth)).groups[0].blocks[0].to(dtype).eval()
    assert block.btype == "spatial"
    ipt_fast.accelerate(block, verify=False)

    class OfMaps(torch.nn.Module):
        def forward(self, x):
            return block(x.flatten(2).transpose(1, 2), x.shape[2], x.shape[3])

    model = OfMaps()
    model.block = block
    width = 8 * torch.export.Dim("eighths", min=2, max=64)
    traced, other = (torch.rand(1, 120, 16, size).to(dtype) for size in (24, 40))
    exported = torch.export.export(model, (traced,), dynamic_shapes=({3: width},), strict=False)
    with torch.no_grad():
        found, expected = exported.module()(other), model(other)
    assert (found - expected).abs().max() <= 4 * torch.finfo(dtype).eps * expected.abs().max()
