"""Frozen models: a form for inference, whose weights are packed once because they can no longer change."""

import copy
import dataclasses
import threading
from collections.abc import Iterable
from typing import Any, NoReturn, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _extension
from ._precision import DTYPES, usable_dtype
from .acceleration.accelerated import Accelerated, accelerated_class, settled_class
from .acceleration.accelerated import reason_against as reason_against_rule
from .acceleration.rules._weights import remembering
from .models.contract import Contract, attached_config, describe
from .modules import _fusion
from .modules._layer import Branch, Modulation, Norm, Residuals, reason_against_fusing
from .modules.convolution import EMULATED, Conv2d, taken_for_channels_last
from .modules.feed_forward import RepLeFFN, reason_against_merging, reparameterize
from .modules.normalization import ModulatedLayerNorm2d
from .ops._explain import explain
from .ops._packed import PackedOperator, computing_dtype, kernels_take
from .ops._select import policy


def freeze(model: nn.Module, dtype: torch.dtype | str | None = None) -> "Frozen":
    """A form of ``model`` for inference, with the same results; ``model`` is left as it is.

    On the CPU it is faster, most of all on small images: the weights of layers are merged and packed once, not in every
    call, and a layer costs a few microseconds of Python. Elsewhere, and where no compiled kernels are installed, a call
    takes as long as the model's.

    Args:
        model: any module, on its device. Parts that are changed (hooks, adapters, replaced forwards) run as they do in
            the model, unpacked; hooks must be there before.
        dtype: torch.float32, bfloat16 or float16, or their names; by default that of the model's parameters. Half
            precision runs as the model in float32 does under autocast, bit for bit: images are float32 or of this
            dtype, and parameters other than the weights of products stay in float32.

    Raises:
        TypeError: ``model`` is no module. ValueError: another dtype, or weights that are not in memory.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    own = model.dtype if isinstance(model, Frozen) else _dtype_of(model.parameters())
    if dtype is None and own not in DTYPES.values():
        raise ValueError(f"model must be in {', '.join(DTYPES)} where dtype is not given; got {own}")
    return Frozen(prepared(model, None), dtype or own)


def prepared(model: nn.Module, device: torch.device | None) -> nn.Module:
    """A copy of ``model`` that is ready for inference in float32: on ``device``, in eval mode, branches merged."""
    model = copy.deepcopy(model._plain if isinstance(model, Frozen) else model)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("model must have its weights in memory; got the meta device (offloaded, not loaded)")
    model = model.to(device, torch.float32).eval()
    # Branches with hooks or adapters cannot be merged: they run as they are.
    if reason_against_merging(model) is None:
        describe(model).reparameterize()
        reparameterize(model)
    return model


class Frozen(_fusion.Fusable):
    """What :func:`freeze` makes: a module without parameters, called as the model is, that nothing can change.

    Moving, casting, training or loading into it raises a RuntimeError, and so do its state dict and an input that
    requires a gradient under grad mode; outputs carry none. It can be copied, pickled and called by several threads,
    and packs its weights again where it finds other instructions than before (another machine, IPT_FAST_CPU_ISA).
    Backends other than "auto" and "cpu", and ``torch.export``, get the model's own operators.
    """

    _plain: nn.Module  # in float32; no submodule, so that nothing finds its parameters

    def __init__(self, plain: nn.Module, dtype: torch.dtype | str) -> None:
        super().__init__()
        device = next((tensor.device for tensor in (*plain.parameters(), *plain.buffers())), torch.device("cpu"))
        object.__setattr__(self, "_plain", plain)
        self._device, self._dtype = device, usable_dtype(dtype, device)
        self._packed: tuple[str, nn.Module] | None = None  # for a level of instructions, packed from _plain
        self._packing = threading.Lock()
        self.training = False
        if self._uses_packed():
            self._ensure_packed()

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def in_dtype(self, dtype: torch.dtype) -> "Frozen":
        """The same model frozen in another dtype."""
        return self if dtype == self.dtype else Frozen(self._plain, dtype)

    @property
    def config(self) -> Any:
        """That of the model; None of one that has none."""
        return attached_config(self._plain)

    @property
    def contract(self) -> Contract:
        return dataclasses.replace(describe(self._plain), reparameterize=Contract.reparameterize)

    def reasons_against_fusing(self) -> dict[str, str | None]:
        return explain(self._plain)

    def extra_repr(self) -> str:
        return f"{type(self._plain).__name__}, dtype={self.dtype}, device={self.device}"

    # -- calls --------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns for these arguments."""
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor):
                self._check(value)
        device = self.device.type
        with torch.no_grad(), torch.autocast(device, self.dtype, enabled=self.dtype != torch.float32):
            return self._in_use()(*args, **kwargs)

    def _check(self, x: Tensor) -> None:
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "x must not require a gradient, as a frozen model has none: call it under torch.no_grad(), or train "
                "the model that was frozen"
            )
        if x.device != self.device:
            raise ValueError(f"x must be on {self.device} as the frozen model; got {x.device}")
        if x.is_floating_point() and x.dtype not in (torch.float32, self.dtype):
            allowed = " or ".join(map(str, dict.fromkeys((torch.float32, self.dtype))))
            raise TypeError(f"x must be {allowed}, as the model is frozen in {self.dtype}; got {x.dtype}")

    def _in_use(self) -> nn.Module:
        if torch.compiler.is_compiling():
            # What is exported runs on every processor; what is compiled runs as it is asked for now.
            if torch.compiler.is_exporting() or not self._is_packed_now():
                return self._plain
            return self._packed[1]  # type: ignore[index]  # `_is_packed_now` has packed
        return self._ensure_packed() if self._uses_packed() else self._plain

    def _uses_packed(self) -> bool:
        if self.device.type != "cpu" or policy() not in ("auto", "cpu") or not _extension.load():
            return False
        return _fusion.global_hooks() is None

    @torch.compiler.assume_constant_result
    def _is_packed_now(self) -> bool:
        if self._uses_packed():
            self._ensure_packed()
            return True
        return False

    def _ensure_packed(self) -> nn.Module:
        level, packed = _extension.isa(), self._packed
        if packed is None or packed[0] != level:
            with self._packing:
                packed = self._packed
                if packed is None or packed[0] != level:
                    assert level is not None  # the extension is there
                    packed = self._packed = level, _packed_form(self._plain, self.dtype, {})
        return packed[1]

    # -- copies and files ---------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None, "_packing": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._packing = threading.Lock()

    # -- what would change it -----------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> Self:
        return _refuse("be trained") if mode else self

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        return _refuse("be trained") if requires_grad else self

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        _refuse("be moved or cast")

    def to(self, *args: Any, **kwargs: Any) -> Self:
        _refuse("be moved or cast")

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        _refuse("take other weights")

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        _refuse("take other weights")  # as a part of another module

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        _refuse("tell its weights", "save the model itself, or the frozen one whole by torch.save")


def _refuse(what: str, instead: str = "change the model itself and freeze it again") -> NoReturn:
    raise RuntimeError(f"a frozen model cannot {what}: {instead}")


def _dtype_of(parameters: Iterable[Tensor]) -> torch.dtype:
    return next((p.dtype for p in parameters if p.is_floating_point()), torch.float32)


# -- the packed form --------------------------------------------------------------------------------------------


def _packed_layer(norm: Norm, branch: Branch, dtype: torch.dtype) -> PackedOperator | None:
    """The operator of a layer, packed; None where the kernels do not take what it needs."""
    modulation, given = None, set[str]()
    if isinstance(norm, ModulatedLayerNorm2d):  # each call brings what differs from image to image
        modulation = Modulation(*torch.ones(3, 1, branch.channels).unbind())
        given = {"norm_weight", "norm_bias", "gate"}
    arguments = branch.layer_arguments(norm, modulation)
    if not kernels_take(branch.layer_operator, branch.channels, arguments, dtype):
        return None
    packed = {name: value for name, value in arguments.items() if name not in given}
    return PackedOperator(branch.layer_operator, packed, dtype, norm)


# Packed modules are what they were, in class and attributes, and have another forward: models may read any of it.


class _Convolution(nn.Conv2d):
    """A convolution with its weight in the layout of channels-last maps and the dtype of products."""

    def pack(self, dtype: torch.dtype) -> None:
        weight = self.weight.detach().to(dtype, memory_format=torch.channels_last, copy=True)
        self.__dict__["packed"] = weight, None if self.bias is None else self.bias.detach().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.__dict__["packed"]
        dtype = computing_dtype(x)
        if dtype is not weight.dtype or not taken_for_channels_last(x):
            return super().forward(x)
        return F.conv2d(x.to(dtype), weight, bias, self.stride, self.padding, self.dilation, self.groups)


class _OwnConvolution(_Convolution, Conv2d):
    """The same of :class:`ipt_fast.modules.convolution.Conv2d`."""


class _FeedForward(RepLeFFN):
    def pack(self, dtype: torch.dtype) -> None:
        self.__dict__["packed"] = PackedOperator("leffn", self.branch_arguments(), dtype)

    def forward(self, x: Tensor) -> Tensor:
        packed = self.__dict__["packed"]
        return packed(x) if packed.takes(x) else super().forward(x)


_PACKED_CLASSES = {nn.Conv2d: _Convolution, Conv2d: _OwnConvolution, RepLeFFN: _FeedForward}


def _packed_form(module: nn.Module, dtype: torch.dtype, known: dict[nn.Module, nn.Module]) -> nn.Module:
    """``module`` with packed layers in the place of those that can be packed; what has none in it is taken as it is."""
    if module not in known:
        known[module] = module  # a module may hold itself
        form = _packed_alone(module, dtype) or _settled(module, dtype, known)
        known[module] = form or _with_packed_parts(module, dtype, known)
    return known[module]


def _packed_alone(module: nn.Module, dtype: torch.dtype) -> nn.Module | None:
    """A packed copy of a module of certain classes that nobody has changed, or None."""
    if type(module) not in _PACKED_CLASSES or _fusion.changed(module) is not None:
        return None
    if isinstance(module, RepLeFFN):
        packable = module.merged and not module.plain and module.changed_inside() is None
        packable = packable and kernels_take("leffn", module.channels, module.branch_arguments(), dtype)
    else:
        assert isinstance(module, nn.Conv2d)
        packable = dtype not in EMULATED and "_conv_forward" not in module.__dict__ and module.padding_mode == "zeros"
    if not packable:
        return None
    form = copy.copy(module)
    form.__class__ = _PACKED_CLASSES[type(module)]
    form.pack(dtype)  # type: ignore[operator]
    return form


def _settled(module: nn.Module, dtype: torch.dtype, known: dict[nn.Module, nn.Module]) -> nn.Module | None:
    """A copy of an accelerated module, whose parts remember what their weights give, or None where it is changed."""
    if not isinstance(module, Accelerated) or type(module) is not accelerated_class(module.plain_class, module.rule):
        return None
    if "forward" in module.__dict__ or reason_against_rule(module) is not None:
        return None
    copies = {part: copy.copy(part) for part in (module, *module.rule.parts(module)) if known.get(part, part) is part}
    known.update(copies)
    for form in copies.values():
        remembering(form)
        children = form._modules.items()
        form._modules = {name: child and _packed_form(child, dtype, known) for name, child in children}
    copies[module].__class__ = settled_class(type(module))  # type: ignore[arg-type]  # classes are hashable
    return copies[module]


def _with_packed_parts(module: nn.Module, dtype: torch.dtype, known: dict[nn.Module, nn.Module]) -> nn.Module:
    replaced: dict[str, nn.Module] = {}
    if isinstance(module, Residuals) and _fusion.changed(module) is None:
        for norm_name, branch_name in module.residuals:
            norm, branch = getattr(module, norm_name), getattr(module, branch_name)
            if reason_against_fusing(norm, branch) is None and getattr(branch, "merged", True):
                if (layer := _packed_layer(norm, branch, dtype)) is None:
                    continue
                replaced[branch_name] = copy.copy(branch)  # called by itself, it is what it was
                replaced[branch_name].__dict__["packed_layer"] = layer
    # A rule asks what the parts are that it reads.
    read = set(module.rule.parts(module)) if isinstance(module, Accelerated) else set()
    for name, child in module._modules.items():
        if child is not None and name not in replaced and read.isdisjoint(child.modules()):
            form = _packed_form(child, dtype, known)
            if form is not child:
                replaced[name] = form
    if not replaced or isinstance(module, Branch) or "forward" in module.__dict__:
        return module  # a branch asks what its parts are; a forward of its own may be bound to this very module
    form = copy.copy(module)
    form._modules = {**module._modules, **replaced}
    return form
