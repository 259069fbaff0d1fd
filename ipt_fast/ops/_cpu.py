"""The C++ backend of an operator: private operators of the same name and arguments in the library ipt_fast_cpu."""

import functools

import torch

from .. import _extension
from ._operator import Kernel

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check(args):
    """None if the extension is loaded and takes the first of ``args`` (None: in general), else the reason."""
    if error := _extension.error():
        return error
    if args is None:
        return None
    x = args[0]
    if x.device.type != "cpu":
        return f"the C++ kernels run on the CPU; the tensors are on {x.device}"
    if x.dtype not in DTYPES:
        return f"the C++ kernels take float32, bfloat16 and float16; the tensors are {x.dtype}"
    return None


@functools.cache
def _private(name):
    return getattr(torch.ops.ipt_fast_cpu, name).default


def kernel(name):
    """``ipt_fast_cpu::<name>`` and ``<name>_backward``, which returns an empty gradient for an absent tensor."""

    def forward(*args):
        return _private(name)(*args)

    def backward(grad, *args):
        return _private(f"{name}_backward")(grad, *args)

    return Kernel(check, forward, backward)
