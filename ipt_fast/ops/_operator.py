"""What every operator shares: schema, checks, backend selection, fake, autograd, autocast and FLOP formula."""

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from . import _select

_library = torch.library.Library("ipt_fast", "DEF")
AUTOCAST_DEVICES = ("cpu", "cuda")
OPERATORS: dict[str, "Operator"] = {}

Arguments = tuple[Any, ...]  # of a call, in the order of the schema
Shape = Sequence[int]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One backend's implementation of an operator.

    ``check(args)`` answers None or the reason it cannot run (``args`` None: on any arguments); ``forward(*args)``
    returns the output; ``backward(grad, *args)`` returns one gradient per tensor argument (anything for an absent one);
    ``automatic(args)`` tells whether "auto" takes it where it can run.
    """

    check: Callable[[Arguments | None], str | None]
    forward: Callable[..., Tensor]
    backward: Callable[..., Sequence[Tensor | None]]
    automatic: Callable[[Arguments], bool] = lambda args: True


def as_channels_last(x: Tensor) -> Tensor:
    """``x`` with exactly the strides of a channels-last map of its shape, which also settles axes of size 1."""
    batch, channels, height, width = x.shape
    if x.stride() == (height * width * channels, 1, width * channels, channels):
        return x
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last).copy_(x)


_AUTOCAST_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)


# With it excluded, tensors that a kernel makes as views of its own memory leave as tensors in their own right.
_VIEW_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)


def _autograd_recording() -> contextlib.AbstractContextManager[Any]:
    """Make autograd record inside a kernel, where the dispatcher has switched it off."""
    keys, key_set = torch._C.DispatchKey, torch._C.DispatchKeySet
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (keys.AutogradCPU, keys.AutogradCUDA, keys.AutogradOther, keys.AutogradFunctionality):
        excluded = excluded - key_set(key)
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)


class Operator:
    """A forward and a backward operator under ``torch.ops.ipt_fast``.

    Args:
        function: the public function; its parameters, in order, are the arguments of the schema.
        schema: the argument list in PyTorch's schema language, without defaults.
        reference: the reference of the same name.
        images: names of the (B, C, H, W) arguments. The output and their gradients are channels-last.
        weights: names of the convolution weights. Images and weights share a dtype; the other tensors ("small
            parameters": temperatures, maps, bias tables, norm weights) may also be float32.
        output_shape: function of the arguments.
        flops: function of the arguments' shapes, for ``torch.utils.flop_counter``.
        autocast: cast images and weights to the autocast dtype; False leaves all arguments as they are.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        schema: str,
        reference: Callable[..., Tensor],
        *,
        images: tuple[str, ...] = (),
        weights: tuple[str, ...] = (),
        output_shape: Callable[..., Shape],
        flops: Callable[..., int],
        autocast: bool = True,
    ) -> None:
        self.function = function
        self.name, self.schema = function.__name__, schema
        self.arguments = tuple(inspect.signature(function).parameters)
        self.images, self.weights = images, weights
        types = self._by_name(argument.split()[0] for argument in schema.split(","))
        self.tensors = tuple(name for name, kind in types.items() if kind in ("Tensor", "Tensor?"))
        self.optional = {name for name, kind in types.items() if kind == "Tensor?"}
        self.cast = {*images, *weights} if autocast else set()
        self.output_shape = output_shape
        self.formula = reference
        self.kernels = {"reference": Kernel(lambda args: None, self._call_reference, self._reference_backward)}
        OPERATORS[self.name] = self
        self._register(flops)

    def __call__(self, *args: Any) -> Tensor:
        return self._forward_op(*args)

    def _by_name(self, args: Iterable[Any]) -> dict[str, Any]:
        return dict(zip(self.arguments, args, strict=True))

    # -- checks -------------------------------------------------------------------------------------------------

    def check_tensors(self, *values: object) -> None:
        """Check type, device, dtype and, for images, rank of all tensor arguments, given in order.

        Raises:
            TypeError: not a floating-point tensor, or a dtype that does not go with the first argument's.
            ValueError: on another device than the first, or not (B, C, H, W) with C, H, W at least 1.
            RuntimeError: it carries a forward-mode tangent.
        """
        dtype = device = None
        for name, value in zip(self.tensors, values, strict=True):
            if value is None and name in self.optional:
                continue
            if not isinstance(value, torch.Tensor):
                raise TypeError(f"{self.name}: {name} must be a tensor; got {type(value).__name__}")
            if not value.is_floating_point():
                raise TypeError(f"{self.name}: {name} must be a floating-point tensor; got {value.dtype}")
            # PyTorch would drop the tangent without a word.
            if forward_ad._current_level >= 0 and forward_ad.unpack_dual(value).tangent is not None:
                raise RuntimeError(f"{self.name} has no forward-mode derivative; use reverse mode")
            if device is None:
                dtype, device = self._dtype_after_autocast(name, value), value.device
            if value.device != device:
                raise ValueError(f"{self.name}: {name} is on {value.device}; it must be on {device} as the others")
            if name in self.images and (value.dim() != 4 or 0 in value.shape[1:]):
                raise ValueError(
                    f"{self.name}: {name} must be (B, C, H, W) with at least one channel, row and column; "
                    f"got shape {tuple(value.shape)}"
                )
            self._check_dtype(name, self._dtype_after_autocast(name, value), dtype)

    def _check_dtype(self, name: str, got: torch.dtype, dtype: torch.dtype | None) -> None:
        small = name not in self.images and name not in self.weights
        allowed = [dtype, torch.float32] if small else [dtype]
        if got not in allowed:
            raise TypeError(
                f"{self.name}: {name} must be {' or '.join(map(str, dict.fromkeys(allowed)))} "
                f"beside {self.tensors[0]} of {dtype}; got {got}"
            )

    def _dtype_after_autocast(self, name: str, value: Tensor) -> torch.dtype:
        device = value.device.type
        castable = name in self.cast and value.dtype != torch.float64 and device in AUTOCAST_DEVICES
        return torch.get_autocast_dtype(device) if castable and torch.is_autocast_enabled(device) else value.dtype

    # -- the reference backend ----------------------------------------------------------------------------------

    def _call_reference(self, *args: Any) -> Tensor:
        first, *others = self.arguments
        values = self._by_name(args)
        return self.formula(values[first], **{name: values[name] for name in others})

    def _reference_backward(self, grad: Tensor, *args: Any) -> list[Tensor | None]:
        with _autograd_recording(), torch.enable_grad():
            leaves = [a.detach().requires_grad_() if isinstance(a, torch.Tensor) else a for a in args]
            tensors = [a for a in leaves if isinstance(a, torch.Tensor)]
            out = self._call_reference(*leaves)
            # A gradient may be a view of the upstream one, which must not come back as an alias.
            grads = iter(torch.autograd.grad(out, tensors, grad.clone()))
        values = self._by_name(args)
        return [None if values[name] is None else next(grads) for name in self.tensors]

    # -- registration -------------------------------------------------------------------------------------------

    def _register(self, flops: Callable[..., int]) -> None:
        names = self.arguments
        backward_name = f"{self.name}_backward"
        gradients = ", ".join(["Tensor"] * len(self.tensors))
        _library.define(f"{self.name}({self.schema}) -> Tensor")
        _library.define(f"{backward_name}(Tensor grad, {self.schema}, str? backend) -> ({gradients})")
        self._forward_op = getattr(torch.ops.ipt_fast, self.name).default
        self._backward_op = getattr(torch.ops.ipt_fast, backward_name).default

        _library.impl(self.name, self._run_forward, "CompositeExplicitAutograd")
        _library.impl(backward_name, self._run_backward, "CompositeExplicitAutograd")
        torch.library.register_fake(f"ipt_fast::{self.name}", self._fake_forward, lib=_library)
        torch.library.register_fake(f"ipt_fast::{backward_name}", self._fake_backward, lib=_library)

        def setup_context(ctx: Any, inputs: Arguments, output: object) -> None:
            # A traced graph outlives this call: its backward chooses when it runs.
            ctx.backend = _select.choose(self, inputs) if type(output) is torch.Tensor else None
            ctx.save_for_backward(*(v for v in inputs if isinstance(v, torch.Tensor)))
            ctx.others = [None if isinstance(v, torch.Tensor) else (v,) for v in inputs]

        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            saved = iter(ctx.saved_tensors)
            inputs = [next(saved) if other is None else other[0] for other in ctx.others]
            grads = dict(zip(self.tensors, self._backward_op(grad, *inputs, ctx.backend), strict=True))
            values = self._by_name(inputs)
            return tuple(grads[name] if isinstance(values[name], torch.Tensor) else None for name in names)

        def no_second_derivative(ctx: Any, *grads: Any) -> NoReturn:
            raise RuntimeError(f"ipt_fast.ops.{self.name} cannot be differentiated twice")

        torch.library.register_autograd(f"ipt_fast::{self.name}", backward, setup_context=setup_context, lib=_library)
        torch.library.register_autograd(f"ipt_fast::{backward_name}", no_second_derivative, lib=_library)

        for device in AUTOCAST_DEVICES:
            _library.impl(self.name, self._autocast(device), f"Autocast{device.upper()}")

        register_flop_formula(getattr(torch.ops.ipt_fast, self.name))(
            lambda *shapes, out_shape=None, **kwargs: flops(*shapes)
        )
        register_flop_formula(getattr(torch.ops.ipt_fast, backward_name))(
            lambda grad, *shapes, out_shape=None, **kwargs: 2 * flops(*shapes[:-1])
        )

    def _autocast(self, device: str) -> Callable[..., Tensor]:
        excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

        def run(*args: Any) -> Tensor:
            cast = [
                value.to(self._dtype_after_autocast(name, value)) if name in self.cast else value
                for name, value in self._by_name(args).items()
            ]
            with torch._C._ExcludeDispatchKeyGuard(excluded):
                return self._forward_op(*cast)

        return run

    def _run_forward(self, *args: Any) -> Tensor:
        kernel = self.kernels[_select.choose(self, args)]
        with torch._C._ExcludeDispatchKeyGuard(_VIEW_KEYS):
            out = kernel.forward(*args)
            return as_channels_last(out) if self.images else out.contiguous()

    def _run_backward(self, grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
        *inputs, backend = args
        kernel = self.kernels[_select.choose(self, inputs, demanded=backend)]
        values = self._by_name(inputs)
        # Products inside keep their dtype.
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS | _VIEW_KEYS):
            grads = zip(self.tensors, kernel.backward(grad, *inputs), strict=True)
            return tuple(self._gradient_like(grad, name, values[name], value) for name, value in grads)

    def _gradient_like(self, grad: Tensor, name: str, tensor: Tensor | None, value: Tensor | None = None) -> Tensor:
        """The gradient ``value`` of ``tensor`` with its final strides; empty for an absent tensor, and in fakes."""
        if tensor is None:
            return grad.new_empty(0)
        image = name in self.images
        if value is None:
            return torch.empty_like(tensor, memory_format=torch.channels_last if image else torch.contiguous_format)
        return as_channels_last(value) if image else value.contiguous()

    def _fake_forward(self, *args: Any) -> Tensor:
        layout = torch.channels_last if self.images else torch.contiguous_format
        first = args[0]
        return torch.empty(self.output_shape(*args), dtype=first.dtype, device=first.device, memory_format=layout)

    def _fake_backward(self, grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
        values = self._by_name(args[:-1])
        return tuple(self._gradient_like(grad, name, values[name]) for name in self.tensors)
