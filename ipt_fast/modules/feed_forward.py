"""The re-parameterised feed-forward network of IPT-V2 and the convolutions it is made of."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import reference
from . import _check, _fusion
from ._layer import Branch, Norm, OperatorModule

WEIGHTS = ("expand_weight", "depthwise_weight", "project_weight")  # arguments of leffn and leffn_layer


class Reparameterized(OperatorModule):
    """A convolution with linear branches (training form) or with their merged weight (merged form).

    Subclasses name their branches and the operator that merges them. A merged convolution accepts the state dict of the
    training form and merges it while loading.
    """

    branches: tuple[str, ...]
    merge: str
    weight: Tensor

    def __init__(self, merged: bool) -> None:
        super().__init__()
        self.merged = merged

    def changed_inside(self) -> str | None:
        """Why the branches have to be called, or None where their weights say all."""
        raise NotImplementedError

    def current_weight(self) -> Tensor:
        """The weight of the single convolution; in training form merged now, differentiably."""
        if self.merged:
            return self.weight
        return getattr(self.operators, self.merge)(*(getattr(self, name).weight for name in self.branches))

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Replace the branches by their merged weight, computed in float64 and rounded once. Idempotent.

        Raises:
            ValueError: a branch is no plain convolution (any more), so that its weight does not say what it computes.
        """
        if self.merged:
            return
        if reason := self.changed_inside():
            raise ValueError(f"{type(self).__name__} must have plain convolutions to be merged; got: {reason}")
        weights = [getattr(self, name).weight for name in self.branches]
        weight = self._merged(weights)
        for name in self.branches:
            delattr(self, name)
        self.weight = nn.Parameter(weight, requires_grad=weights[0].requires_grad)
        self.merged = True

    def _merged(self, weights: list[Tensor]) -> Tensor:
        # On the reference, whatever backend is demanded: the kernels are not for float64.
        return getattr(reference, self.merge)(*(w.double() for w in weights)).to(weights[0].dtype)

    def merge_state(self, state: dict[str, Tensor], prefix: str) -> None:
        """Where this convolution is merged, replace its branches in a training-form state dict by the merged weight."""
        keys = [f"{prefix}{name}.weight" for name in self.branches]
        if self.merged and all(key in state for key in keys):
            branches = [state.pop(key) for key in keys]
            # A file of 16 bits is merged in the precision of the model, so that its weights are rounded once.
            dtype = torch.promote_types(branches[0].dtype, self.weight.dtype)
            state[f"{prefix}weight"] = self._merged([branch.to(dtype) for branch in branches])

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        self.merge_state(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


def reason_against_merging(model: nn.Module) -> str | None:
    """Why the weights of the branches in ``model`` do not say what they compute (the first case), or None."""
    for name, module in model.named_modules():
        if isinstance(module, Reparameterized) and not module.merged and (reason := module.changed_inside()):
            return f"{name}.{reason}"
    return None


def reparameterize(model: nn.Module) -> None:
    """Merge the branches of every convolution in ``model``, in place; idempotent.

    Raises:
        ValueError: a branch is no plain convolution (any more): it has hooks, an adapter, a parametrisation. Nothing is
            merged then.
    """
    if reason := reason_against_merging(model):
        raise ValueError(f"model must have plain convolutions to be merged; got: {reason}")
    for module in model.modules():
        if isinstance(module, Reparameterized):
            module.reparameterize()


@_fusion.stock
class RepPointwise(Reparameterized):
    """PW(PW(x)), or the one pointwise convolution it equals."""

    branches = ("first", "second")
    merge = "merge_pointwise"

    def __init__(self, in_channels: int, mid_channels: int, out_channels: int, merged: bool = False) -> None:
        super().__init__(merged)
        if merged:
            self.weight = nn.Conv2d(in_channels, out_channels, 1, bias=False).weight
        else:
            self.first = nn.Conv2d(in_channels, mid_channels, 1, bias=False)
            self.second = nn.Conv2d(mid_channels, out_channels, 1, bias=False)

    def changed_inside(self) -> str | None:
        if self.merged:
            return None
        return _fusion.first(first=_fusion.pointwise(self.first), second=_fusion.pointwise(self.second))

    @property
    def entry(self) -> nn.Module:
        """The module whose weight meets the input."""
        return self if self.merged else self.first

    def merging_pays(self, tokens: int) -> bool:
        """Whether merging and one convolution of ``tokens`` pixels take fewer multiplications than the two branches."""
        if self.merged:
            return True
        mid, cin = self.first.weight.shape[:2]
        out = self.second.weight.shape[0]
        return out * mid * cin + tokens * out * cin < tokens * mid * (cin + out)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight) if self.merged else self.second(self.first(x))


@_fusion.stock
class RepDepthwise(Reparameterized):
    """DW5x5(x) + DW3x3(x) + DW1x1(x) + x, or the one 5x5 depthwise convolution it equals."""

    branches = ("k5", "k3", "k1")
    merge = "merge_depthwise"

    def __init__(self, channels: int, kernel_size: int = 5, merged: bool = False) -> None:
        super().__init__(merged)
        self.padding = kernel_size // 2

        def depthwise(kernel: int) -> nn.Conv2d:
            return nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels, bias=False)

        if merged:
            self.weight = depthwise(kernel_size).weight
        else:
            self.k5, self.k3, self.k1 = depthwise(5), depthwise(3), depthwise(1)

    def changed_inside(self) -> str | None:
        if self.merged:
            return None
        return _fusion.first(
            k5=_fusion.depthwise(self.k5, 5), k3=_fusion.depthwise(self.k3, 3), k1=_fusion.depthwise(self.k1, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        if not self.merged and (self.plain or _fusion.global_hooks() or self.changed_inside()):
            return self.k5(x) + self.k3(x) + self.k1(x) + x
        return F.conv2d(x, self.current_weight(), padding=self.padding, groups=x.shape[1])


@_fusion.stock
class RepLeFFN(Branch):
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

    layer_operator = "leffn_layer"

    def __init__(
        self, channels: int, ratio: int = 4, inner_ratio: int = 2, kernel_size: int = 5, merged: bool = False
    ) -> None:
        super().__init__()
        _check.positive_ints(channels=channels, ratio=ratio, inner_ratio=inner_ratio, kernel_size=kernel_size)
        _check.flags(merged=merged)
        if kernel_size != 5 and not (merged and kernel_size % 2 == 1):
            raise ValueError(f"kernel_size must be 5, or odd in merged form; got {kernel_size}")
        self.channels = channels
        hidden, inner = ratio * channels, inner_ratio * channels
        self.expand = RepPointwise(channels, inner, hidden, merged)
        self.depthwise = RepDepthwise(hidden, kernel_size, merged)
        self.project = RepPointwise(hidden, inner, channels, merged)

    @property
    def merged(self) -> bool:
        """Whether all its convolutions are merged, as far as they are ours and not replaced."""
        return all(module.merged for module in self.modules() if isinstance(module, Reparameterized))

    def reparameterize(self) -> None:
        """Merge the branches, in place; see :func:`reparameterize`."""
        reparameterize(self)

    def changed_inside(self) -> str | None:
        return _fusion.first(
            expand=_changed(self.expand, RepPointwise),
            depthwise=_changed(self.depthwise, RepDepthwise),
            project=_changed(self.project, RepPointwise),
        )

    def forward(self, x: Tensor) -> Tensor:
        fused = not (self.plain or _fusion.global_hooks() or self.changed_inside())
        _check.image(x, self.channels, self.expand.entry if fused else None)
        if not fused or self._branches_are_cheaper(x):
            return self.project(self.depthwise(F.gelu(self.expand(x))))
        return self.operators.leffn(x, *self._current_weights())

    def layer(self, x: Tensor, norm: Norm) -> Tensor:
        _check.image(x, self.channels, self.expand.entry)
        if self._branches_are_cheaper(x):
            return x + self(norm(x))
        return super().layer(x, norm)

    def layer_arguments(self, norm: Norm) -> dict[str, Any]:
        own = dict(zip(WEIGHTS, self._current_weights(), strict=True))
        return dict(norm_weight=norm.weight, norm_bias=norm.bias, **own, eps=norm.eps, centered=norm.centered)

    def _current_weights(self) -> tuple[Tensor, ...]:
        return tuple(convolution.current_weight() for convolution in (self.expand, self.depthwise, self.project))

    def _branches_are_cheaper(self, x: Tensor) -> bool:
        if torch.compiler.is_compiling():  # a compiled graph serves all sizes, so it must not branch on the size
            return False
        tokens = x.shape[0] * x.shape[2] * x.shape[3]
        return not (self.expand.merging_pays(tokens) and self.project.merging_pays(tokens))


def _changed(convolution: nn.Module, cls: type[Reparameterized]) -> str | None:
    if reason := _fusion.changed(convolution):
        return reason
    return convolution.changed_inside() if isinstance(convolution, cls) else f"it is no {cls.__name__}"
