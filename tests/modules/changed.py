"""Small models, the parts of them that fused operators could stand in for, and what users put in their place."""

import functools

import torch
from torch import nn

import ipt_fast
from tests.models.micro import micro_model
from tests.models.small_restormer import small_restormer

IPT_CONFIG = {"tasks": ("denoise50",), "features": 4, "layers": 2, "heads": 3, "image_size": 12}
SMALL, LARGE = 8, 16  # the latent map of the small image is one pixel, where branches run one by one
CONTAINERS = (nn.ModuleList,)  # never called


def ipt():
    return ipt_fast.create_model("ipt_tiny", **IPT_CONFIG).eval()


MODELS = {
    "ipt_v2": (functools.partial(micro_model, depths=(2, 0, 0, 0)), (1, 3, LARGE, LARGE)),
    "ipt_v2 small": (functools.partial(micro_model, depths=(1, 0, 0, 1)), (1, 3, SMALL, SMALL)),
    "ipt_v2 merged": (functools.partial(micro_model, depths=(2, 0, 0, 0), merged=True), (1, 3, LARGE, LARGE)),
    "ipt_v2 ffn": (functools.partial(micro_model, depths=(1, 0, 0, 0), ffn="ffn"), (1, 3, LARGE, LARGE)),
    "restormer": (functools.partial(small_restormer, depths=(1, 1, 1, 1), refinement=0), (1, 3, LARGE, LARGE)),
    "ipt": (ipt, (2, 3, 12, 12)),
}
# One of each kind that a fused operator could stand in for.
PARTS = {
    "ipt_v2": [
        "encoder.0.0.norm1",
        "encoder.0.0.attention",
        "encoder.0.0.attention.qkv",
        "encoder.0.0.attention.depthwise",
        "encoder.0.0.attention.project",
        "encoder.0.0.norm2",
        "encoder.0.0.ffn",
        "encoder.0.0.ffn.expand",
        "encoder.0.0.ffn.expand.first",
        "encoder.0.0.ffn.expand.second",
        "encoder.0.0.ffn.depthwise",
        "encoder.0.0.ffn.depthwise.k5",
        "encoder.0.0.ffn.depthwise.k3",
        "encoder.0.0.ffn.depthwise.k1",
        "encoder.0.0.ffn.project.second",
        "encoder.0.1.attention",
        "encoder.0.1.attention.qkv",
        "encoder.0.1.attention.project",
    ],
    "ipt_v2 merged": ["encoder.0.0.ffn.expand", "encoder.0.0.ffn.depthwise", "encoder.0.0.ffn.project"],
    "ipt_v2 ffn": ["encoder.0.0.ffn", "encoder.0.0.ffn.expand", "encoder.0.0.ffn.project"],
    "restormer": [
        f"decoder_level2.0.{part}"
        for part in (
            "norm1",
            "norm1.body",
            "attn",
            "attn.qkv",
            "attn.qkv_dwconv",
            "attn.project_out",
            "norm2.body",
            "ffn",
        )
        + ("ffn.project_in", "ffn.dwconv", "ffn.project_out")
    ],
    "ipt": [
        f"body.{layer}.{part}"
        for layer, parts in {
            "encoder.layers.0": ("norm1", "self_attn", "self_attn.out_proj", "norm2", "linear1", "linear2"),
            "decoder.layers.1": ("norm1", "self_attn", "norm2", "multihead_attn", "norm3", "linear1", "linear2"),
        }.items()
        for part in parts
    ]
    + ["body.encoder", "body.decoder", "body.query_embed", "body.position_encoding", "body.position_encoding.pe"]
    + ["tail.0"],
}
CASES = [(model, part) for model, parts in PARTS.items() for part in parts]
NAMES = {"qkv", "depthwise", "project", "first", "second", "k3", "project_in"}
CONVOLUTIONS = [
    case for case in CASES if case[1].split(".")[-1] in NAMES and case != ("ipt_v2", "encoder.0.0.ffn.depthwise")
]
LINEARS = [case for case in CASES if "linear" in case[1] or "out_proj" in case[1]]


def build(name):
    torch.manual_seed(1)
    builder, shape = MODELS[name]
    return builder(), torch.rand(shape)


def naive(model, x):
    """The output with every module called, which a hook on all of them sees to."""
    with torch.no_grad():
        handle = nn.modules.module.register_module_forward_pre_hook(lambda *_: None)
        try:
            return model(x)
        finally:
            handle.remove()


def assert_close(value, expected):
    assert (value - expected).abs().max() <= 2e-5 * expected.abs().max()


def replace(model, path, module):
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


class Adapter(nn.Module):
    """Low-rank adaptation: base(x) + up(down(x))."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base = base
        if isinstance(base, nn.Linear):
            self.down, self.up = nn.Linear(base.in_features, rank, False), nn.Linear(rank, base.out_features, False)
        else:
            options = dict(stride=base.stride, padding=base.padding, bias=False)
            self.down = nn.Conv2d(base.in_channels, rank, base.kernel_size, **options)
            self.up = nn.Conv2d(rank, base.out_channels, 1, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))
