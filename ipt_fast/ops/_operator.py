"""What every operator shares: schema, checks, backend selection, fake, autograd, autocast and FLOP formula."""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from ..reference._precision import Reference
from . import _autograd, _select
from ._kernel import AUTOCAST_KEYS, VIEW_KEYS, Arguments, Kernel, as_channels_last, autograd_recording, unwatched

__all__ = ["OPERATORS", "Arguments", "Kernel", "Operator", "Shape", "as_channels_last"]

_library = torch.library.Library("ipt_fast", "DEF")
_AUTOCAST_KEY = {
    device: torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))
    for device in ("cpu", "cuda")
}
AUTOCAST_DEVICES = tuple(_AUTOCAST_KEY)
OPERATORS: dict[str, "Operator"] = {}

Shape = Sequence[int]
# Types of arguments that the dispatcher has nothing to do with, unlike subclasses of tensors and symbolic numbers.
_PLAIN_TYPES = {torch.Tensor, torch.nn.Parameter, type(None), bool, int, float, str, list, tuple}


class Operator:
    """A forward and a backward operator under ``torch.ops.ipt_fast``.

    Args:
        function: the public function; its parameters, in order, are the arguments of the schema.
        schema: the argument list in PyTorch's schema language, without defaults.
        reference: the reference of the same name.
        images: names of the (B, C, H, W) arguments. The outputs and their gradients are channels-last.
        tokens: names of the (B, N, D) arguments, each of any floating dtype. Autocast leaves them as they are.
        weights: names of the weights of products. Images and weights share a dtype; the other tensors ("small
            parameters": temperatures, maps, bias tables, norm weights) have that of the first argument or float32.
        output_shape: function of the arguments; with several outputs it returns a shape for each.
        flops: function of the arguments' shapes, for ``torch.utils.flop_counter``.
        autocast: cast images and weights to the autocast dtype; False leaves all arguments as they are.
        outputs: {name: the argument whose dtype it has}; by default one output in the dtype of the first argument.
        kept: the same of further outputs, which only the backward gets.
        residual: (x, branch, total): x and branch are read as their sum only, which is the output total. It is the
            backward's x, and its gradient is that of both.
        unread: names of arguments whose values the backward does not need. It gets zeros that take no memory.
    """

    def __init__(
        self,
        function: Callable[..., Tensor | tuple[Tensor, ...]],
        schema: str,
        reference: Reference[..., Any],
        *,
        images: tuple[str, ...] = (),
        tokens: tuple[str, ...] = (),
        weights: tuple[str, ...] = (),
        output_shape: Callable[..., Any],
        flops: Callable[..., int],
        autocast: bool = True,
        outputs: Mapping[str, str] | None = None,
        kept: Mapping[str, str] | None = None,
        residual: tuple[str, str, str] | None = None,
        unread: tuple[str, ...] = (),
    ) -> None:
        self.function = function
        self.name, self.schema = function.__name__, schema
        self.arguments = tuple(inspect.signature(function).parameters)
        self.images, self.tokens, self.weights = images, tokens, weights
        types = self._by_name(argument.split()[0] for argument in schema.split(","))
        self.tensors = tuple(name for name, kind in types.items() if kind in ("Tensor", "Tensor?"))
        self.optional = {name for name, kind in types.items() if kind == "Tensor?"}
        self.in_products = tuple(name for name in self.tensors if name in images or name in weights)
        self.cast = {*images, *weights} if autocast else set()
        self.outputs, self.kept = outputs or {"out": self.arguments[0]}, kept or {}
        self.residual, self.unread = residual, (*unread, *(residual or ())[1:2])
        self.differentiated = tuple(name for name in self.tensors if not residual or name != residual[1])
        self.output_shape = output_shape
        self.reference = reference
        self.kernels = {"reference": Kernel(lambda args: None, self._call_reference, self._reference_backward)}
        OPERATORS[self.name] = self
        self._register(flops)

    def __call__(self, *args: Any) -> Any:
        """The output, or a tuple of the outputs and of what is kept."""
        # On a small map the dispatcher's ways through Python take longer than a kernel.
        if args[0].is_cpu and unwatched() and _PLAIN_TYPES.issuperset(map(type, args)):
            return self._under_autocast("cpu", args) if torch.is_autocast_enabled("cpu") else self._compute(args)[1]
        return self._forward_op(*args)

    def _by_name(self, args: Iterable[Any]) -> dict[str, Any]:
        return dict(zip(self.arguments, args, strict=True))

    # -- checks -------------------------------------------------------------------------------------------------

    def check_tensors(self, *values: object) -> None:
        """Check type, device, dtype and, for images and tokens, rank of all tensor arguments, given in order.

        Raises:
            TypeError: not a floating-point tensor, or a dtype that does not go with the others'.
            ValueError: on another device than the first, or not (B, C, H, W) or (B, N, D) without empty axes behind B.
            RuntimeError: it carries a forward-mode tangent.
        """
        dtypes: dict[str, torch.dtype] = {}
        device = None
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
            device = device or value.device
            if value.device != device:
                raise ValueError(f"{self.name}: {name} must be on {device} as {self.tensors[0]}; got {value.device}")
            if name in self.images and (value.dim() != 4 or 0 in value.shape[1:]):
                raise ValueError(
                    f"{self.name}: {name} must have shape (B, C, H, W) with at least one channel, row and column; "
                    f"got {tuple(value.shape)}"
                )
            if name in self.tokens and (value.dim() != 3 or 0 in value.shape[1:]):
                raise ValueError(
                    f"{self.name}: {name} must have shape (B, N, D) with at least one token and channel; "
                    f"got {tuple(value.shape)}"
                )
            dtypes[name] = self._dtype_after_autocast(name, value)
            self._check_dtype(name, dtypes)

    def _check_dtype(self, name: str, dtypes: dict[str, torch.dtype]) -> None:
        """Check the dtype of ``name``, the last of ``dtypes``, beside those before it."""
        if name in self.tokens:
            return
        small = name not in self.in_products
        other = self.tensors[0] if small else self.in_products[0]
        if dtypes[name] == dtypes[other] or (small and dtypes[name] == torch.float32):
            return
        allowed = dict.fromkeys([dtypes[other], torch.float32] if small else [dtypes[other]])
        raise TypeError(
            f"{self.name}: {name} must be {' or '.join(map(str, allowed))} "
            f"beside {other} of {dtypes[other]}; got {dtypes[name]}"
        )

    def _dtype_after_autocast(self, name: str, value: Tensor) -> torch.dtype:
        device = value.device.type
        castable = name in self.cast and value.dtype != torch.float64 and device in AUTOCAST_DEVICES
        return torch.get_autocast_dtype(device) if castable and torch.is_autocast_enabled(device) else value.dtype

    # -- the reference backend ----------------------------------------------------------------------------------

    def _call_reference(self, *args: Any) -> Any:
        first, *others = self.arguments
        values = self._by_name(args)
        return self.reference.everything(values[first], **{name: values[name] for name in others})

    def _reference_backward(self, *args: Any) -> list[Tensor | None]:
        grads, values, _ = self._parts_of_backward(args)
        with autograd_recording(), torch.enable_grad():
            leaves = {
                name: value.detach().requires_grad_(name in self.differentiated)
                if isinstance(value, torch.Tensor)
                else value
                for name, value in values.items()
            }
            wanted = {name: leaves[name] for name in self.differentiated if leaves[name] is not None}
            outputs = _as_tuple(self._call_reference(*leaves.values()))[: len(grads)]
            # A gradient may be a view of the upstream one, which must not come back as an alias.
            upstream = [grad.clone() for grad in grads]
            # The released focal attention of one window reads no weight of the second branch.
            found = torch.autograd.grad(outputs, list(wanted.values()), upstream, materialize_grads=True)
        by_name = dict(zip(wanted, found, strict=True))
        return [by_name.get(name) for name in self.differentiated]

    # -- registration -------------------------------------------------------------------------------------------

    def _register(self, flops: Callable[..., int]) -> None:
        backward_name = f"{self.name}_backward"
        all_outputs = [*self.outputs, *self.kept]
        grads = [f"Tensor grad_{name}" for name in self.outputs] if len(self.outputs) > 1 else ["Tensor grad"]
        kept = [f"Tensor {name}" for name in self._kept_beside_arguments()]
        takes = ", ".join([*grads, self.schema, *kept, "str? backend"])
        _library.define(f"{self.name}({self.schema}) -> {_returns(all_outputs)}")
        _library.define(f"{backward_name}({takes}) -> ({', '.join(['Tensor'] * len(self.differentiated))})")
        self._forward_op = getattr(torch.ops.ipt_fast, self.name).default
        self._backward_op = getattr(torch.ops.ipt_fast, backward_name).default

        _library.impl(self.name, self._run_forward, "CompositeExplicitAutograd")
        _library.impl(backward_name, self._run_backward, "CompositeExplicitAutograd")
        torch.library.register_fake(f"ipt_fast::{self.name}", self._fake_forward, lib=_library)
        torch.library.register_fake(f"ipt_fast::{backward_name}", self._fake_backward, lib=_library)
        _autograd.register(self, _library)
        for device in AUTOCAST_DEVICES:
            run = functools.partial(self._under_autocast, device)
            _library.impl(self.name, lambda *args, run=run: run(args), f"Autocast{device.upper()}")

        register_flop_formula(getattr(torch.ops.ipt_fast, self.name))(
            lambda *shapes, out_shape=None, **kwargs: flops(*shapes)
        )
        first, last = len(self.outputs), len(self.outputs) + len(self.arguments)
        register_flop_formula(getattr(torch.ops.ipt_fast, backward_name))(
            lambda *shapes, out_shape=None, **kwargs: 2 * flops(*shapes[first:last])
        )

    def _under_autocast(self, device: str, args: Arguments) -> Any:
        cast = [
            value if value is None or name not in self.cast else value.to(self._dtype_after_autocast(name, value))
            for name, value in zip(self.arguments, args, strict=True)
        ]
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEY[device]):
            return self(*cast)

    # -- forward and backward -----------------------------------------------------------------------------------

    def _run_forward(self, *args: Any) -> Any:
        backend, outputs = self._compute(args)
        _autograd.remember(_as_tuple(outputs)[0], backend)
        return outputs

    def _compute(self, args: Arguments) -> tuple[str, Any]:
        """(the backend that is chosen, what the operator returns)."""
        backend = _select.choose(self, args)
        with torch._C._ExcludeDispatchKeyGuard(VIEW_KEYS):
            outputs = _as_tuple(self.kernels[backend].forward(*args))
            return backend, _as_returned(
                [as_channels_last(out) if self.images else out.contiguous() for out in outputs]
            )

    def _fake_forward(self, *args: Any) -> Any:
        values, shapes = self._by_name(args), self.output_shape(*args)
        likes = [*self.outputs.values(), *self.kept.values()]
        layout = torch.channels_last if self.images else torch.contiguous_format
        outputs = tuple(
            torch.empty(shape, dtype=values[like].dtype, device=args[0].device, memory_format=layout)
            for like, shape in zip(likes, shapes if len(likes) > 1 else [shapes], strict=True)
        )
        return _as_returned(outputs)

    def call_backward(
        self, grads: Sequence[Tensor | None], values: dict[str, Any], kept: Sequence[Tensor], backend: str | None
    ) -> tuple[Tensor, ...]:
        """The gradients of `differentiated` by the backward operator, on ``backend`` (None: it chooses)."""
        if any(grad is None for grad in grads):  # of an output that nothing depends on
            outputs = _as_tuple(self._fake_forward(*values.values()))
            grads = [torch.zeros_like(out) if g is None else g for g, out in zip(grads, outputs, strict=False)]
        return _as_tuple(self._backward_op(*grads, *values.values(), *kept, backend))

    def _kept_beside_arguments(self) -> list[str]:
        """Names of the kept outputs that do not stand in for an argument."""
        return [name for name in self.kept if self.residual is None or name != self.residual[2]]

    def _parts_of_backward(self, args: Sequence[Any]) -> tuple[Sequence[Tensor], dict[str, Any], Sequence[Tensor]]:
        """(gradients, arguments by name, kept outputs) in the arguments of a backward, without the backend."""
        first, last = len(self.outputs), len(self.outputs) + len(self.arguments)
        return args[:first], self._by_name(args[first:last]), args[last:]

    def _run_backward(self, *args: Any) -> Any:
        *args, backend = args  # type: ignore[assignment]
        grads, values, _ = self._parts_of_backward(args)
        kernel = self.kernels[_select.choose(self, tuple(values.values()), demanded=backend)]
        # Products inside keep their dtype.
        with torch._C._ExcludeDispatchKeyGuard(AUTOCAST_KEYS | VIEW_KEYS):
            found = zip(self.differentiated, kernel.backward(*args), strict=True)
            return _as_returned([self._gradient_like(grads[0], name, values[name], value) for name, value in found])

    def _fake_backward(self, *args: Any) -> Any:
        grads, values, _ = self._parts_of_backward(args[:-1])
        return _as_returned([self._gradient_like(grads[0], name, values[name]) for name in self.differentiated])

    def _gradient_like(self, grad: Tensor, name: str, tensor: Tensor | None, value: Tensor | None = None) -> Tensor:
        """The gradient ``value`` of ``tensor`` with its final strides; empty for an absent tensor, and in fakes."""
        if tensor is None:
            return grad.new_empty(0)
        image = name in self.images
        if value is None:
            return torch.empty_like(tensor, memory_format=torch.channels_last if image else torch.contiguous_format)
        return as_channels_last(value) if image else value.contiguous()


def _as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _as_returned(tensors: Sequence[Tensor]) -> Any:
    """What an operator returns: one tensor on its own, several as a tuple."""
    return tuple(tensors) if len(tensors) > 1 else tensors[0]


def _returns(outputs: Sequence[str]) -> str:
    return f"({', '.join(f'Tensor {name}' for name in outputs)})" if len(outputs) > 1 else "Tensor"
