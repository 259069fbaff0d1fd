"""Maps whose strides say nothing about their memory: an axis of one element may have any."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tests.ops.cases import CALLS, DEVICE, IMAGES, build, outputs

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="kernels on GPUs copy nothing that a profile of the CPU shows")


def copied_maps(operator, tensors, options):
    """(outputs, how many maps are copied)"""
    shapes = [list(value.shape) for name, value in tensors.items() if name in IMAGES]
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        found = outputs(operator, tensors, options)
    copies = [e for e in profiled.events() if e.name == "aten::copy_" and e.input_shapes[0] in shapes]
    return found, len(copies)


@pytest.mark.parametrize("call", CALLS)
def test_a_map_of_one_image_is_read_in_place(call):
    operator, tensors, options = build(call, (1, 7, 9), torch.float32)
    dense = {
        name: value.contiguous(memory_format=torch.channels_last) if name in IMAGES and value.dim() == 4 else value
        for name, value in tensors.items()
    }
    other = {
        name: value.as_strided(value.shape, (1, *value.stride()[1:])) if name in IMAGES and value.dim() == 4 else value
        for name, value in dense.items()
    }
    expected, copies = copied_maps(operator, dense, options)
    found, copies_of_other = copied_maps(operator, other, options)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert copies_of_other == copies
