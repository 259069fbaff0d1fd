"""The re-parameterised feed-forward network of IPT-V2 and the convolutions it is made of."""

import torch
import torch.nn.functional as F
from torch import nn

from .. import ops
from . import _check


class Reparameterized(nn.Module):
    """A convolution with linear branches (training form) or with their merged weight (merged form).

    Subclasses name their branches and compute ``merged_weight(*branch weights)``. A merged convolution accepts the
    state dict of the training form and merges it while loading.
    """

    branches: tuple[str, ...]

    def __init__(self, merged):
        super().__init__()
        self.merged = merged

    def current_weight(self):
        """The weight of the single convolution; in training form merged now, differentiably."""
        if self.merged:
            return self.weight
        return self.merged_weight(*(getattr(self, name).weight for name in self.branches))

    @torch.no_grad()
    def reparameterize(self):
        """Replace the branches by their merged weight, computed in float64 and rounded once. Idempotent."""
        if self.merged:
            return
        weights = [getattr(self, name).weight for name in self.branches]
        weight = self.merged_weight(*(w.double() for w in weights)).to(weights[0].dtype)
        for name in self.branches:
            delattr(self, name)
        self.weight = nn.Parameter(weight, requires_grad=weights[0].requires_grad)
        self.merged = True

    def merge_state(self, state, prefix):
        """Where this convolution is merged, replace its branches in a training-form state dict by the merged weight."""
        keys = [f"{prefix}{name}.weight" for name in self.branches]
        if self.merged and all(key in state for key in keys):
            weights = [state.pop(key) for key in keys]
            state[f"{prefix}weight"] = self.merged_weight(*(w.double() for w in weights)).to(weights[0].dtype)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        self.merge_state(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


class RepPointwise(Reparameterized):
    """PW(PW(x)), or the one pointwise convolution it equals."""

    branches = ("first", "second")

    def __init__(self, in_channels, mid_channels, out_channels, merged=False):
        super().__init__(merged)
        if merged:
            self.weight = nn.Conv2d(in_channels, out_channels, 1, bias=False).weight
        else:
            self.first = nn.Conv2d(in_channels, mid_channels, 1, bias=False)
            self.second = nn.Conv2d(mid_channels, out_channels, 1, bias=False)

    def merged_weight(self, first, second):
        return ops.merge_pointwise(first, second)

    @property
    def input_weight(self):
        """The weight of the convolution that takes the input."""
        return self.weight if self.merged else self.first.weight

    def merging_pays(self, tokens):
        """Whether merging and one convolution of ``tokens`` pixels take fewer multiplications than the two branches."""
        if self.merged:
            return True
        mid, cin = self.first.weight.shape[:2]
        out = self.second.weight.shape[0]
        return out * mid * cin + tokens * out * cin < tokens * mid * (cin + out)

    def forward(self, x):
        return F.conv2d(x, self.weight) if self.merged else self.second(self.first(x))


class RepDepthwise(Reparameterized):
    """DW5x5(x) + DW3x3(x) + DW1x1(x) + x, or the one 5x5 depthwise convolution it equals."""

    branches = ("k5", "k3", "k1")

    def __init__(self, channels, kernel_size=5, merged=False):
        super().__init__(merged)
        self.padding = kernel_size // 2

        def depthwise(kernel):
            return nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels, bias=False)

        if merged:
            self.weight = depthwise(kernel_size).weight
        else:
            self.k5, self.k3, self.k1 = depthwise(5), depthwise(3), depthwise(1)

    def merged_weight(self, k5, k3, k1):
        return ops.merge_depthwise(k5, k3, k1)

    def forward(self, x):
        return F.conv2d(x, self.current_weight(), padding=self.padding, groups=x.shape[1])


class RepLeFFN(nn.Module):
    """Re-parameterised locally enhanced feed-forward network (IPT-V2, section 3.5, eq. 5 and 6).

    PW(DW(GELU(PW(x)))). In training form each PW is two pointwise convolutions in sequence and the DW is the sum of
    5x5, 3x3 and 1x1 depthwise convolutions and the identity. The training form, too, runs as one LeFFN whose weights
    are merged differentiably in every forward, unless the map is so small that running the branches is cheaper.

    Args:
        channels: C.
        ratio: the hidden map has ratio * C channels.
        inner_ratio: inner width of the sequential pointwise convolutions, inner_ratio * C.
        kernel_size: of the depthwise convolution; 5 in training form, any odd size in merged form.
        merged: build the merged form.

    Shape: (B, C, H, W) -> (B, C, H, W).
    """

    def __init__(self, channels, ratio=4, inner_ratio=2, kernel_size=5, merged=False):
        super().__init__()
        _check.positive_ints(channels=channels, ratio=ratio, inner_ratio=inner_ratio, kernel_size=kernel_size)
        _check.flags(merged=merged)
        if kernel_size != 5 and not (merged and kernel_size % 2 == 1):
            raise ValueError(f"kernel_size must be 5, or odd in merged form; got {kernel_size}")
        hidden, inner = ratio * channels, inner_ratio * channels
        self.expand = RepPointwise(channels, inner, hidden, merged)
        self.depthwise = RepDepthwise(hidden, kernel_size, merged)
        self.project = RepPointwise(hidden, inner, channels, merged)

    @property
    def merged(self):
        """Whether all three convolutions are merged."""
        return all(convolution.merged for convolution in (self.expand, self.depthwise, self.project))

    def reparameterize(self):
        """Merge the branches, in place; idempotent."""
        for convolution in (self.expand, self.depthwise, self.project):
            convolution.reparameterize()

    def forward(self, x):
        _check.image(x, self.expand.input_weight)
        if self._branches_are_cheaper(x):
            return self.project(self.depthwise(F.gelu(self.expand(x))))
        return ops.leffn(x, *self._current_weights())

    def layer(self, x, norm):
        """x + self(norm(x)) as one operator; ``norm`` is a :class:`LayerNorm2d`."""
        _check.image(x, self.expand.input_weight)
        if self._branches_are_cheaper(x):
            return x + self(norm(x))
        weights = self._current_weights()
        return ops.leffn_layer(x, norm.weight, norm.bias, *weights, eps=norm.eps, centered=norm.centered)

    def _current_weights(self):
        return (self.expand.current_weight(), self.depthwise.current_weight(), self.project.current_weight())

    def _branches_are_cheaper(self, x):
        if torch.compiler.is_compiling():  # a compiled graph serves all sizes, so it must not branch on the size
            return False
        tokens = x.shape[0] * x.shape[2] * x.shape[3]
        return not (self.expand.merging_pays(tokens) and self.project.merging_pays(tokens))
