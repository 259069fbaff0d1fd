"""Channel attention of whole images and groups: see ipt_fast.ops.channel_attention, _gram.py and _attend.py.

Windows are found in the map. Dilated and overlapping groups are copied apart (_regrouping.py); what overlaps is
averaged in fp32.
"""

import torch

from ._attend import apply, attend
from ._gram import gram
from ._gram_backward import gradients
from ._regrouping import regrouping_of
from ._windows import Channels, Groups, parts_of
from .pointwise import empty_map


def _groups_of(maps, num_heads, window):
    """A window, (rows, columns) or None, that holds the whole image is the whole image."""
    batch, _, height, width = maps[0].shape
    depth = sum(x.shape[1] for x in maps) // (3 * num_heads)
    if window is None or (window[0] >= height and window[1] >= width):
        return Groups.whole(batch, height, width, num_heads, depth)
    return Groups(batch, height, width, num_heads, depth, tuple(window), 1)


def _channels_of(maps):
    return parts_of(maps[0]) if len(maps) == 1 else map(Channels, maps)


def attend_channels(maps, temperature, num_heads, window, dilation, overlapping):
    """The result, and the Gram matrices, of which the backward has use. ``maps``: q, k and v, or one of all three."""
    x = maps[0]
    if (regrouping := regrouping_of(x, window, dilation, overlapping)) is not None:
        out, slots = attend_channels([*map(regrouping.apart, maps)], temperature, num_heads, None, None, False)
        return (regrouping.joined(out, x) / regrouping.counts(x)).to(x.dtype), slots
    groups, (q, k, v) = _groups_of(maps, num_heads, window), _channels_of(maps)
    slots = gram(groups, q, k)
    out = empty_map(x, groups.channels)
    apply(groups, v, attend(groups, slots, temperature, False, x.dtype), (None, None), out)
    return out, slots


def attend_channels_backward(grad, maps, temperature, num_heads, window, dilation, overlapping, slots=None):
    """The gradients of the maps, a list, and of the temperature."""
    x = maps[0]
    if (regrouping := regrouping_of(x, window, dilation, overlapping)) is not None:
        grad = regrouping.apart((grad / regrouping.counts(x)).to(grad.dtype))
        apart = [*map(regrouping.apart, maps)]
        grads, of_temperature = attend_channels_backward(grad, apart, temperature, num_heads, None, None, False, slots)
        return [regrouping.joined(each, x).to(x.dtype) for each in grads], of_temperature
    groups, grads = _groups_of(maps, num_heads, window), [torch.empty_like(each) for each in maps]
    written = grads * 3 if len(maps) == 1 else grads
    of_temperature, _ = gradients(groups, Channels(grad), *_channels_of(maps), written, temperature, False, slots=slots)
    return grads, of_temperature.to(temperature.dtype)


def channel_attention(q, k, v, temperature, *groups):
    return attend_channels([q, k, v], temperature, *groups)[0]


def channel_attention_backward(grad, q, k, v, temperature, *groups):
    maps = [x.contiguous(memory_format=torch.channels_last) for x in (q, k, v)]  # gradients have their layout
    grads, grad_temperature = attend_channels_backward(grad, maps, temperature, *groups)
    return *grads, grad_temperature
