"""Half a transformer layer, x + branch(norm(x)): as one operator where that is the same, else module by module.

A modulated one (adaLN-Zero) is x + gate * branch(norm(x)), where each image has its own weight and bias of the norm and
its own gate.
"""

from types import ModuleType
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from .. import ops, reference
from . import _fusion


class OperatorModule(_fusion.Fusable):
    """A module that calls operators: those of :mod:`ipt_fast.ops` or, in a plain twin, their references."""

    @property
    def operators(self) -> ModuleType:
        return reference if self.plain else ops


class Modulation(NamedTuple):
    """Of each image: weight (1 + scale) and bias (shift) of a norm, and gate of the branch behind it; all (B, C)."""

    weight: Tensor
    bias: Tensor
    gate: Tensor


class Norm(OperatorModule):
    """A norm that the layers' operators have built in: ``weight``, ``bias`` or None, ``eps`` and ``centered``.

    One that is modulated has neither weight nor bias, and is called with them.
    """

    weight: Tensor
    bias: Tensor | None
    eps: float
    centered: bool

    def changed_inside(self) -> str | None:
        """Why what is in it has to be called, or None."""
        return None


class Branch(OperatorModule):
    """An attention or a feed-forward network, which a layer puts between a norm and a residual connection.

    ``layer_operator`` is the name of the operator x + self(norm(x)).
    """

    layer_operator: ClassVar[str]
    channels: int

    def changed_inside(self) -> str | None:
        """Why its submodules have to be called one by one, or None."""
        raise NotImplementedError

    def branch_arguments(self) -> dict[str, Any]:
        """Those arguments of the layer's operator that come from the branch, by name."""
        raise NotImplementedError

    def layer_arguments(self, norm: Norm, modulation: Modulation | None = None) -> dict[str, Any]:
        """The arguments of the layer's operator but x, by name."""
        weight, bias, gate = modulation or (norm.weight, norm.bias, None)
        own = self.branch_arguments()
        return dict(norm_weight=weight, norm_bias=bias, **own, gate=gate, eps=norm.eps, centered=norm.centered)

    def layer(self, x: Tensor, norm: Norm, modulation: Modulation | None = None) -> Tensor:
        """x + gate * self(norm(x)) as one operator, where :func:`reason_against_fusing` has nothing against it."""
        return getattr(self.operators, self.layer_operator)(x, **self.layer_arguments(norm, modulation))


def reason_against_fusing(norm: nn.Module, branch: nn.Module) -> str | None:
    """Why x + branch(norm(x)) has to run module by module, or None where one operator computes it."""
    if reason := _fusion.global_hooks():
        return reason
    if reason := _fusion.first(norm=_fusion.changed(norm), branch=_fusion.changed(branch)):
        return reason
    if not isinstance(branch, Branch) or not isinstance(norm, Norm):
        return f"there is no operator for {type(norm).__name__} and {type(branch).__name__}"
    if branch.plain:
        return "it is a plain twin"
    return _fusion.first(norm=norm.changed_inside()) or branch.changed_inside()


def residual(x: Tensor, norm: nn.Module, branch: nn.Module, modulation: Modulation | None = None) -> Tensor:
    """x + branch(norm(x)), or with a modulation x + gate * branch(norm(x, weight, bias))."""
    packed = branch.__dict__.get("packed_layer")  # of a frozen model
    if packed is not None and packed.norm is norm and packed.takes(x):
        return packed(x, *(modulation or ()))
    if isinstance(norm, Norm) and isinstance(branch, Branch) and reason_against_fusing(norm, branch) is None:
        return branch.layer(x, norm, modulation)
    return by_modules(x, norm, branch, modulation)


def by_modules(x: Tensor, norm: nn.Module, branch: nn.Module, modulation: Modulation | None) -> Tensor:
    """The same, by calls of the modules."""
    if modulation is None:
        return x + branch(norm(x))
    branched = branch(norm(x, modulation.weight, modulation.bias))
    return x + (modulation.gate[..., None, None] * branched).to(branched.dtype)


class Residuals(_fusion.Fusable):
    """A module whose forward is made of calls of :func:`residual`, given by the names of norm and branch."""

    residuals: ClassVar[tuple[tuple[str, str], ...]]

    def reasons_against_fusing(self) -> dict[str, str | None]:
        """{branch: None if one operator computes its residual, else why it runs module by module}."""
        return {
            branch: reason_against_fusing(getattr(self, norm), getattr(self, branch)) for norm, branch in self.residuals
        }
