"""The C++ backend of an operator: private operators of the same name and arguments in the library ipt_fast_cpu.

Their schemas are the operator's own. The library implements them: where a function of its does not take what the schema
says, the backend cannot run, with that reason.
"""

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload

from .. import _extension
from . import _limits
from ._operator import Arguments, Kernel, Operator


def check(args: Arguments | None) -> str | None:
    """None if the extension is loaded and takes the first of ``args`` (None: in general), else the reason."""
    if error := _extension.error():
        return error
    if args is None:
        return None
    x = args[0]
    if x.device.type != "cpu":
        return f"the C++ kernels run on the CPU; the tensors are on {x.device}"
    return _limits.dtype_error(x.dtype, "the C++ kernels")


@functools.cache
def _private(name: str) -> OpOverload:
    return getattr(torch.ops.ipt_fast_cpu, name).default


def register(operator: Operator, keeps_a_map: bool = False, packs: bool = False) -> None:
    """Give ``operator`` the backend "cpu": ``ipt_fast_cpu::<name>`` and ``<name>_backward``.

    The latter returns an empty gradient for an absent tensor.

    Args:
        operator: the `Operator`.
        keeps_a_map: the forward keeps an intermediate map in the dtype of the images. Where that is float16, whose
            range the map may leave, it gets float32.
        packs: the library has the operator in two steps, too, for :func:`pack`: ``pack_<name>`` of all arguments but
            the image x, and ``<name>_packed`` of x, what the former returned, and those of `OF_IMAGES` that the
            operator has: where given, they take the place of packed ones. The output has the shape of x.
    """
    name, gradients = operator.name, ", ".join(["Tensor"] * len(operator.tensors))
    _extension.declare("ipt_fast_cpu", f"{name}({operator.schema}) -> Tensor")
    _extension.declare("ipt_fast_cpu", f"{name}_backward(Tensor grad, {operator.schema}) -> ({gradients})")

    if packs:
        image, weights = operator.schema.split(", ", 1)
        weights = weights.replace("Tensor norm_weight", "Tensor? norm_weight")
        of_images = [f"Tensor? {argument}=None" for argument in OF_IMAGES if argument in operator.arguments]
        packed = ", ".join([image, "Tensor packed", *of_images])
        _extension.declare("ipt_fast_cpu", f"pack_{name}({weights}) -> Tensor")
        _extension.declare("ipt_fast_cpu", f"{name}_packed({packed}) -> Tensor", _like_the_image)
        _PACKS[name] = keeps_a_map, operator.arguments[1:]

    def forward(*args: Any) -> Tensor:
        if keeps_a_map and args[0].dtype == torch.float16:
            return _private(name)(*_wide(args)).half()
        return _private(name)(*args)

    def backward(grad: Tensor, *args: Any) -> Sequence[Tensor | None]:
        found = _private(f"{name}_backward")(grad, *args)
        if grad.dtype == torch.float32:
            return found
        # A layer's gradients are computed in float32 and rounded here, once.
        tensors = [
            value for argument, value in zip(operator.arguments, args, strict=True) if argument in operator.tensors
        ]
        return [g if t is None else g.to(t.dtype) for g, t in zip(found, tensors, strict=True)]

    operator.kernels["cpu"] = Kernel(check, forward, backward)


def _like_the_image(x: Tensor, *_: Any) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


# Arguments that may differ from image to image. Each call of packed weights may bring its own, in this order.
OF_IMAGES = ("norm_weight", "norm_bias", "gate")

# Of operators that pack: whether float16 runs as float32, and the arguments that are packed.
_PACKS: dict[str, tuple[bool, tuple[str, ...]]] = {}


class Packed(NamedTuple):
    """An operator whose weights are packed for the level of instructions in use.

    ``run(x, block)``, for x of ``dtype``, computes with what was packed, and with more arguments, those of `OF_IMAGES`
    that the operator has, by name or in this order, with a norm and a gate of this call, of ``dtype`` or float32. It
    raises at another level, and where x or another tensor does not fit.
    """

    run: OpOverload
    block: Tensor
    dtype: torch.dtype


def pack(operator: Operator, arguments: Mapping[str, Any], dtype: torch.dtype) -> Packed:
    """Pack the weights of ``operator``, given by name, for images of ``dtype``.

    Products get their weights in ``dtype``, as under autocast. ``arguments`` may leave out what has a default, and the
    norm's weight and bias where each call brings them.
    """
    wide, names = _PACKS[operator.name]
    parameters = inspect.signature(operator.function).parameters.values()
    given = {**dict.fromkeys(OF_IMAGES), **{p.name: p.default for p in parameters if p.default is not p.empty}}
    given.update(arguments)
    values = [
        given[name].to(dtype) if name in operator.weights and given[name] is not None else given[name] for name in names
    ]
    if dtype == torch.float16 and wide:
        values, dtype = _wide(tuple(values)), torch.float32
    with torch.no_grad():
        block = _private(f"pack_{operator.name}")(*values)
    return Packed(_private(f"{operator.name}_packed"), block, dtype)


def _wide(args: Arguments) -> list[Any]:
    return [value.float() if isinstance(value, torch.Tensor) else value for value in args]
