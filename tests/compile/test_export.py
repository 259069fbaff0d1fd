"""torch.export of whole models: one size, any size, and back from a file; and of operators."""

import pytest
import torch
from torch.export import Dim, export, load, save

from tests.models.micro import micro_model
from tests.ops.cases import IMAGE_CALLS, IMAGES, OPERATORS, build, public

SHALLOW = {"depths": (2, 0, 0, 0)}


def relative(value, truth):
    return ((value - truth).abs().max() / truth.abs().max()).item()


@pytest.mark.parametrize("config", [{"in_channels": 6}, {"merged": True, "norm": "with_bias"}])
def test_static(config):
    model = micro_model(**SHALLOW | config)
    x = torch.rand(1, model.config.in_channels, 13, 18)
    program = export(model, (x,))
    assert relative(program.module()(x), model(x)) < 1e-5
    called = {str(node.target) for node in program.graph.nodes}
    for operator in ("focal_attention_layer", "grid_attention_layer", "leffn_layer"):
        assert f"ipt_fast.{operator}.default" in called
    with pytest.raises(Exception, match=r"shape|size|guard"):
        program.module()(torch.rand(1, model.config.in_channels, 14, 18))


@pytest.mark.parametrize("merged", [False, True])
def test_dynamic_batch_height_and_width(tmp_path, merged):
    model = micro_model(merged=merged, **SHALLOW)
    # PyTorch takes a size of 1 for a constant; below 9 pixels the latent map has one row or column.
    shapes = {"x": {0: Dim("batch"), 2: Dim("height", min=9), 3: Dim("width", min=9)}}
    program = export(model, (torch.rand(2, 3, 24, 40),), dynamic_shapes=shapes)
    save(program, tmp_path / "model.pt2")
    module = load(tmp_path / "model.pt2").module()
    for shape in [(2, 24, 40), (1, 16, 9), (3, 13, 41), (1, 70, 9)]:
        x = torch.rand(shape[0], 3, *shape[1:])
        assert relative(module(x), model(x)) < 1e-5


class Call(torch.nn.Module):
    """An operator whose inputs are its images."""

    def __init__(self, operator, tensors, options):
        super().__init__()
        self.operator, self.options = operator, options
        for name, value in tensors.items():
            self.register_buffer(name, value)

    def forward(self, images):
        return public(self.operator, {**dict(self.named_buffers()), **images}, self.options)


@pytest.mark.parametrize("operator", [name for name in OPERATORS if name in IMAGE_CALLS])
def test_operators_of_any_size(operator):
    def images_of(tensors):
        return {name: value for name, value in tensors.items() if name in IMAGES}

    _, tensors, options = build(operator, (2, 12, 20), torch.float32)
    images = images_of(tensors)
    call = Call(operator, {name: value for name, value in tensors.items() if name not in images}, options)
    sizes = {0: Dim("batch"), 2: Dim("height", min=4), 3: Dim("width", min=4)}
    program = export(call, (images,), dynamic_shapes={"images": dict.fromkeys(images, sizes)})
    assert f"ipt_fast.{operator}.default" in {str(node.target) for node in program.graph.nodes}
    for shape in [(2, 12, 20), (1, 7, 5), (3, 4, 31)]:
        images = images_of(build(operator, shape, torch.float32)[1])
        torch.testing.assert_close(program.module()(images), call(images))
