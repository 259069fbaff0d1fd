"""The re-parameterised feed-forward network of IPT-V2 and the convolutions it is made of."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import reference
from . import _check, _fusion
from ._layer import Branch, Modulation, Norm, OperatorModule, by_modules

CONVOLUTIONS = ("expand", "depthwise", "project")


class Reparameterized(OperatorModule):
    """A convolution with linear branches (training form) or with their merged weight (merged form).

    Subclasses name their branches and the operator that merges them. A merged convolution accepts the state dict of the
    training form and merges it while loading.
    """

    branches: tuple[str, ...]
    merge: str
    weight: Tensor
    bias: Tensor | None

    def __init__(self, merged: bool) -> None:
        super().__init__()
        self.merged = merged

    def _take(self, convolution: nn.Conv2d) -> None:
        """Be merged, with the parameters of ``convolution`` as they are initialised."""
        self.weight, self.bias = convolution.weight, convolution.bias

    def changed_inside(self) -> str | None:
        """Why the branches have to be called, or None where their weights say all."""
        raise NotImplementedError

    def current_weight(self) -> Tensor:
        """The weight of the single convolution; in training form merged now, differentiably."""
        if self.merged:
            return self.weight
        return getattr(self.operators, self.merge)(*self._of_branches("weight"))

    def current_bias(self) -> Tensor | None:
        """The bias of the single convolution; None where there is none."""
        if self.merged:
            return getattr(self, "bias", None)  # those pickled before there were biases have no such attribute
        return self.merge_biases(self._of_branches("weight"), self._of_branches("bias"))

    def merge_biases(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor | None:
        """The bias of the single convolution, from weights and biases of the branches."""
        raise NotImplementedError

    def _of_branches(self, name: str) -> list[Any]:
        return [getattr(getattr(self, branch), name) for branch in self.branches]

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
        weights = self._of_branches("weight")
        merged = self._merged(weights, self._of_branches("bias"))
        for name in self.branches:
            delattr(self, name)
        for name, value in merged.items():
            parameter = None if value is None else nn.Parameter(value, requires_grad=weights[0].requires_grad)
            self.register_parameter(name, parameter)
        self.merged = True

    def _merged(self, weights: list[Tensor], biases: list[Tensor | None]) -> dict[str, Tensor | None]:
        """The merged "weight" and "bias"."""
        dtype, wide = weights[0].dtype, [w.double() for w in weights]
        bias = self.merge_biases(wide, [None if b is None else b.double() for b in biases])
        # On the reference, whatever backend is demanded: the kernels are not for float64.
        weight = getattr(reference, self.merge)(*wide)
        return {"weight": weight.to(dtype), "bias": None if bias is None else bias.to(dtype)}

    def merge_state(self, state: dict[str, Tensor], prefix: str) -> None:
        """Where this convolution is merged, replace its branches in a training-form state dict by what they make."""
        keys = [f"{prefix}{name}.weight" for name in self.branches]
        if not self.merged or not all(key in state for key in keys):
            return
        weights = [state.pop(key) for key in keys]
        biases = [state.pop(f"{prefix}{name}.bias", None) for name in self.branches]
        # A file of 16 bits is merged in the precision of the model, so that its weights are rounded once.
        dtype = torch.promote_types(weights[0].dtype, self.weight.dtype)
        merged = self._merged([weight.to(dtype) for weight in weights], biases)
        state.update({f"{prefix}{name}": value for name, value in merged.items() if value is not None})

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


def merged_form(model: nn.Module, default: bool) -> bool:
    """Whether the Rep-LeFFNs of ``model`` are merged; ``default`` where there are none.

    Raises:
        ValueError: some are and some are not.
    """
    forms = {module.merged for module in model.modules() if isinstance(module, RepLeFFN)}
    if len(forms) > 1:
        raise ValueError("model must be merged or not, reparameterize() merges the rest; got one merged in part")
    return forms.pop() if forms else default


@_fusion.stock
class RepPointwise(Reparameterized):
    """PW(PW(x)), or the one pointwise convolution it equals."""

    branches = ("first", "second")
    merge = "merge_pointwise"

    def __init__(
        self, in_channels: int, mid_channels: int, out_channels: int, merged: bool = False, bias: bool = False
    ) -> None:
        super().__init__(merged)
        if merged:
            self._take(nn.Conv2d(in_channels, out_channels, 1, bias=bias))
        else:
            self.first = nn.Conv2d(in_channels, mid_channels, 1, bias=bias)
            self.second = nn.Conv2d(mid_channels, out_channels, 1, bias=bias)

    def changed_inside(self) -> str | None:
        if self.merged:
            return None
        return _fusion.first(first=_fusion.pointwise(self.first), second=_fusion.pointwise(self.second))

    def merge_biases(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor | None:
        inner, outer = biases
        if inner is None:
            return outer
        through = (weights[1].flatten(1) * inner).sum(1)  # no product by its name, which autocast would round
        return through if outer is None else through + outer

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
        return F.conv2d(x, self.weight, self.current_bias()) if self.merged else self.second(self.first(x))


@_fusion.stock
class RepDepthwise(Reparameterized):
    """DW5x5(x) + DW3x3(x) + DW1x1(x) + x, or the one 5x5 depthwise convolution it equals."""

    branches = ("k5", "k3", "k1")
    merge = "merge_depthwise"

    def __init__(self, channels: int, kernel_size: int = 5, merged: bool = False, bias: bool = False) -> None:
        super().__init__(merged)
        self.padding = kernel_size // 2

        def depthwise(kernel: int) -> nn.Conv2d:
            return nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels, bias=bias)

        if merged:
            self._take(depthwise(kernel_size))
        else:
            self.k5, self.k3, self.k1 = depthwise(5), depthwise(3), depthwise(1)

    def changed_inside(self) -> str | None:
        if self.merged:
            return None
        return _fusion.first(
            k5=_fusion.depthwise(self.k5, 5), k3=_fusion.depthwise(self.k3, 3), k1=_fusion.depthwise(self.k1, 1)
        )

    def merge_biases(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor | None:
        given = [bias for bias in biases if bias is not None]
        return sum(given[1:], start=given[0]) if given else None

    def forward(self, x: Tensor) -> Tensor:
        if not self.merged and (self.plain or _fusion.global_hooks() or self.changed_inside()):
            return self.k5(x) + self.k3(x) + self.k1(x) + x
        return F.conv2d(x, self.current_weight(), self.current_bias(), padding=self.padding, groups=x.shape[1])


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
        bias: of every convolution.

    Shape: (B, C, H, W) -> (B, C, H, W).
    """

    layer_operator = "leffn_layer"

    def __init__(
        self,
        channels: int,
        ratio: int = 4,
        inner_ratio: int = 2,
        kernel_size: int = 5,
        merged: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__()
        _check.positive_ints(channels=channels, ratio=ratio, inner_ratio=inner_ratio, kernel_size=kernel_size)
        _check.flags(merged=merged, bias=bias)
        if kernel_size != 5 and not (merged and kernel_size % 2 == 1):
            raise ValueError(f"kernel_size must be 5, or odd in merged form; got {kernel_size}")
        self.channels = channels
        hidden, inner = ratio * channels, inner_ratio * channels
        self.expand = RepPointwise(channels, inner, hidden, merged, bias)
        self.depthwise = RepDepthwise(hidden, kernel_size, merged, bias)
        self.project = RepPointwise(hidden, inner, channels, merged, bias)

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
        return self.operators.leffn(x, **self.branch_arguments())

    def layer(self, x: Tensor, norm: Norm, modulation: Modulation | None = None) -> Tensor:
        _check.image(x, self.channels, self.expand.entry)
        if self._branches_are_cheaper(x):
            return by_modules(x, norm, self, modulation)
        return super().layer(x, norm, modulation)

    def branch_arguments(self) -> dict[str, Any]:
        """Weights and biases, merged, by the names that leffn and leffn_layer give them."""
        found = {}
        for name in CONVOLUTIONS:
            convolution = getattr(self, name)
            found[f"{name}_weight"] = convolution.current_weight()
            found[f"{name}_bias"] = convolution.current_bias()
        return found

    def _branches_are_cheaper(self, x: Tensor) -> bool:
        if torch.compiler.is_compiling():  # a compiled graph serves all sizes, so it must not branch on the size
            return False
        tokens = x.shape[0] * x.shape[2] * x.shape[3]
        return not (self.expand.merging_pays(tokens) and self.project.merging_pays(tokens))


def _changed(convolution: nn.Module, cls: type[Reparameterized]) -> str | None:
    if reason := _fusion.changed(convolution):
        return reason
    return convolution.changed_inside() if isinstance(convolution, cls) else f"it is no {cls.__name__}"
