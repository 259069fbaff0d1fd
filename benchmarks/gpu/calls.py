"""What the models ask of a GPU: every distinct call of an operator, found by running the models on "meta" tensors."""

import dataclasses
import functools

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ipt_fast
from benchmarks import baseline
from ipt_fast.ops._cuda import key_of
from ipt_fast.ops._operator import OPERATORS

INFERENCE = [("ipt_v2_base", 1, 512), ("ipt_v2_small", 1, 512)]
TRAINING = ("ipt_v2_base", 16, 128)


@dataclasses.dataclass
class Call:
    """A call of ``torch.ops.ipt_fast.<name>``; ``counts``: how often each model makes it."""

    name: str
    arguments: tuple  # tensors on "meta", and other values, in the order of the schema
    counts: dict

    @property
    def operator(self):
        return OPERATORS[self.name.removesuffix("_backward")]

    @property
    def is_backward(self):
        return self.name.endswith("_backward")

    @property
    def forward_arguments(self):
        return self.arguments[1:-1] if self.is_backward else self.arguments

    @property
    def dtype(self):
        return str(self.forward_arguments[0].dtype).removeprefix("torch.")

    @property
    def shape(self):
        return "x".join(map(str, self.forward_arguments[0].shape))

    @property
    def key(self):
        """The widths and numbers on which the choice of a kernel depends, as `ipt_fast.ops._cuda` has it."""
        return key_of(self.operator, self.forward_arguments)

    @property
    def label(self):
        return f"{self.name} {self.shape} {self.key}"

    def forward(self):
        """The forward call of a backward one."""
        return Call(self.operator.name, self.forward_arguments, self.counts)

    @property
    def values(self):
        """Of all tensors, for putting the largest calls first."""
        return sum(v.numel() for v in self.arguments if isinstance(v, torch.Tensor))

    def real(self, device, sides=None, batch=None):
        """The arguments on a device, with random values; ``sides`` and ``batch`` in place of the images' own."""
        images = {*self.operator.images, "grad"} if self.operator.images else set()
        names = (["grad"] if self.is_backward else []) + list(self.operator.arguments)
        found = []
        for name, value in zip(names, self.arguments, strict=False):
            if not isinstance(value, torch.Tensor):
                found.append(value)
                continue
            shape = value.shape
            if name in images:
                shape = (batch or shape[0], shape[1], *(sides or shape[2:]))
            found.append(_random(shape, name in images or name == "grad", name in self.operator.weights, value, device))
        return (*found, None) if self.is_backward else tuple(found)

    def on(self, backend, arguments):
        """A function that makes the call on a backend, without the dispatcher."""
        if backend in ("eager", "sdpa"):
            return _rival(self, backend, arguments)
        kernel = self.operator.kernels[backend]
        if self.is_backward:
            return lambda: kernel.backward(*arguments[:-1])
        return lambda: kernel.forward(*arguments)

    def reason_against(self, backend, arguments):
        kernel = self.operator.kernels.get(backend)
        inputs = arguments[1:-1] if self.is_backward else arguments
        return "there is no kernel" if kernel is None else kernel.check(inputs)

    def launches(self, choice=0):
        """The launches of the Triton kernels, recorded; tensors stay on "meta"."""
        from ipt_fast.kernels import _launch

        with _launch.record(choice) as launches:
            self.on("triton", self.arguments)()
        return launches


def _random(shape, is_image, is_weight, like, device):
    value = torch.empty(shape, device=device, dtype=like.dtype)
    if is_image:
        value.normal_()
        return value.contiguous(memory_format=torch.channels_last) if value.dim() == 4 else value
    if is_weight:
        return value.normal_().mul_(max(1, value[0].numel()) ** -0.5)
    return value.uniform_(0.5, 1.5)


SDPA = {"grid_attention": baseline.sdpa_grid_attention, "grid_attention_layer": baseline.sdpa_grid_layer}


def _rival(call, name, arguments):
    """The plain formula, every intermediate in the dtype of the images."""
    formula = SDPA[call.operator.name] if name == "sdpa" else baseline.formula(call.operator.name)
    inputs = arguments[1:-1] if call.is_backward else arguments
    dtype = inputs[0].dtype
    tensors = {n: v.to(dtype) for n, v in zip(call.operator.arguments, inputs, strict=True) if torch.is_tensor(v)}
    others = {n: v for n, v in zip(call.operator.arguments, inputs, strict=True) if not torch.is_tensor(v)}

    def forward(tensors):
        first, *rest = (tensors | others)[call.operator.arguments[0]], *call.operator.arguments[1:]
        return formula(first, **{n: (tensors | others)[n] for n in rest})

    if not call.is_backward:
        return lambda: forward(tensors)
    leaves = {n: t.detach().requires_grad_() for n, t in tensors.items()}

    def forward_and_backward():
        with torch.enable_grad(), torch.inference_mode(False):
            return torch.autograd.grad(forward(leaves), list(leaves.values()), arguments[0])

    return forward_and_backward


class _Record(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "ipt_fast":
            self.calls.append((function._opname, args))
        return function(*args, **(kwargs or {}))


def meta_model(name, merged, training=False):
    """A model on "meta" with the dtypes of bf16 inference or, for training, of autocast."""
    with torch.device("meta"):
        model = ipt_fast.create_model(name, merged=merged).to(torch.bfloat16)
    if training:
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() != 4:
                parameter.data = parameter.data.float()
                assert parameter_name
    return model.to(memory_format=torch.channels_last)


def image(batch, size, dtype=torch.bfloat16, device="meta"):
    return torch.rand(batch, 3, size, size, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)


@functools.cache
def of_models(training=True):
    """All distinct `Call`s, the largest first."""
    found = {}

    def keep(label, calls):
        for name, arguments in calls:
            key = repr([name, *(describe(a) for a in arguments)])
            call = found.setdefault(key, Call(name, _detached(arguments), {}))
            call.counts[label] = call.counts.get(label, 0) + 1

    for name, batch, size in INFERENCE:
        with torch.inference_mode(), _Record() as record:
            meta_model(name, True).eval()(image(batch, size))
        keep(name, record.calls)
    if training:
        name, batch, size = TRAINING
        with _Record() as record:
            meta_model(name, False, training=True).train()(image(batch, size)).sum().backward()
        keep(f"{name} training", record.calls)
    return sorted(found.values(), key=lambda call: -call.values)


def matching(only):
    """The calls whose labels a regular expression matches; ends the program if there are none."""
    found = [call for call in of_models() if only.search(call.label)]
    if not found:
        raise SystemExit(f"no call of the models matches {only.pattern!r}")
    return found


def describe(value):
    return (tuple(value.shape), value.dtype) if isinstance(value, torch.Tensor) else value


def _detached(arguments):
    return tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments)
