"""The reference operators against published modules: timm's MaxViT, OmniSR and Restormer.

The modules' own projections are run by the modules; what lies between them is what the operator computes.
"""

import pytest
import torch

from ipt_fast import reference
from tests.oracles import naive
from tests.oracles.public import public_module

OMNISR = "spandrel.architectures.OmniSR.__arch.OSA"
RESTORMER = "spandrel_extra_arches.architectures.Restormer.__arch.restormer_arch"


@pytest.fixture(autouse=True)
def seeded_double():
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def assert_equal(actual, expected):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= 1e-10 * expected.abs().max()


@pytest.mark.parametrize(("height", "width"), [(8, 8), (4, 12), (20, 16)])
def test_grid_map_is_that_of_maxvit(height, width):
    """Row and column of each group's tokens, as timm lays them out and as the formula says."""
    grid_partition = public_module("timm.models.maxxvit").grid_partition
    g = 4
    pixels = torch.cartesian_prod(torch.arange(height), torch.arange(width)).reshape(1, height, width, 2)
    groups = grid_partition(pixels, [g, g])
    for index, group in enumerate(groups):
        expected_group = divmod(index, width // g)
        for a in range(g):
            for b in range(g):
                assert naive.grid_of(*group[a, b].tolist(), height, width, g) == (expected_group, (a, b))


@pytest.mark.parametrize("bias", [True, False])
def test_grid_attention_in_groups_of_maxvit(bias):
    """timm's partition and its inverse around PyTorch's attention; Swin's table is gathered by timm's own index."""
    maxvit = public_module("timm.models.maxxvit")
    index = public_module("timm.layers.pos_embed_rel").gen_relative_position_index((4, 4))
    g, heads, channels, size = 4, 2, 6, [8, 12]
    qkv, table = torch.randn(2, 3 * channels, *size), torch.randn((2 * g - 1) ** 2, heads)
    groups = maxvit.grid_partition(qkv.permute(0, 2, 3, 1), [g, g])
    tokens = groups.reshape(len(groups), g * g, 3, heads, channels // heads).permute(2, 0, 3, 1, 4)
    mask = table[index].permute(2, 0, 1) if bias else None
    out = torch.nn.functional.scaled_dot_product_attention(*tokens, attn_mask=mask)
    out = out.transpose(1, 2).reshape(len(groups), g, g, channels)
    expected = maxvit.grid_reverse(out, [g, g], size).permute(0, 3, 1, 2)
    actual = reference.grid_attention(qkv, table if bias else None, num_heads=heads, grid_size=g)
    assert_equal(actual, expected)


def test_grid_attention_is_that_of_omnisr():
    """OmniSR's attention with relative positions, on the grid rearrangement that its block uses."""
    rearrange = public_module("einops").rearrange
    g, heads, channels = 4, 2, 6
    module = public_module(OMNISR).Attention(channels, dim_head=channels // heads, window_size=g, with_pe=True)
    x = torch.randn(2, channels, 8, 12)
    with torch.no_grad():
        expected = module(rearrange(x, "b c (a h) (b2 w) -> b h w a b2 c", a=g, b2=g))
        expected = rearrange(expected, "b h w a b2 c -> b c (a h) (b2 w)")
        qkv = module.to_qkv(x.movedim(1, -1)).movedim(-1, 1)
        out = reference.grid_attention(qkv, module.rel_pos_bias.weight, num_heads=heads, grid_size=g)
        actual = module.to_out(out.movedim(1, -1)).movedim(-1, 1)
    assert_equal(actual, expected)


def assert_channel_attention_equals(module, heads, window_size):
    with torch.no_grad():
        module.temperature.copy_(torch.linspace(0.5, 3.0, heads).reshape(heads, 1, 1))
        x = torch.randn(2, 6, 8, 12)
        q, k, v = module.qkv_dwconv(module.qkv(x)).chunk(3, dim=1)
        out = reference.channel_attention(q, k, v, module.temperature, num_heads=heads, window_size=window_size)
        assert_equal(module.project_out(out), module(x))


@pytest.mark.parametrize("heads", [1, 2, 3])
def test_channel_attention_in_windows_is_that_of_omnisr(heads):
    module = public_module(OMNISR).Channel_Attention(6, heads=heads, window_size=4)
    assert_channel_attention_equals(module, heads, window_size=4)


@pytest.mark.parametrize("heads", [1, 2, 3])
def test_channel_attention_is_that_of_restormer(heads):
    module = public_module(RESTORMER).Attention(6, num_heads=heads, bias=False)
    assert_channel_attention_equals(module, heads, window_size=None)


@pytest.mark.parametrize("kind", ["BiasFree", "WithBias"])
def test_layer_norm_2d_is_that_of_restormer(kind):
    module = public_module(RESTORMER).LayerNorm(6, kind)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
        x = 2 * torch.randn(2, 6, 4, 5) + 1
        body = module.body
        actual = reference.layer_norm_2d(
            x, body.weight, getattr(body, "bias", None), eps=1e-5, centered=kind == "WithBias"
        )
        assert_equal(actual, module(x))
