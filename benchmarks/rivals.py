"""The runtimes that people take on CPUs instead of PyTorch: OpenVINO and ONNX Runtime (``pip install .[rivals]``).

A contender is made of a module in float32 that PyTorch's own operations compute, and is called with the tensors given
here again and again: it neither copies its inputs nor its outputs.
"""

import importlib.util
import logging
import os
import pathlib
import tempfile
import warnings
import weakref

import torch

# {contender: the packages it needs}
PACKAGES = {
    "openvino": ("openvino",),
    "openvino dynamic": ("openvino",),
    "onnxruntime": ("onnxruntime", "onnx", "onnxscript"),
}

# Which of them take part: exports of large models take minutes.
ASKED = os.environ.get("IPT_FAST_BENCH_RUNTIMES", ",".join(PACKAGES)).split(",")

_made = weakref.WeakKeyDictionary()  # {module: {what: made of it}}


def once(module, what, make):
    """What ``make`` makes of ``module``; made once, as long as the module lives. A model's export takes a minute."""
    made = _made.setdefault(module, {})
    if what not in made:
        made[what] = make()
    return made[what]


class Baked(torch.nn.Module):
    """A function of tensors whose last arguments are weights: a module that takes the others only."""

    def __init__(self, function, weights, keywords):
        super().__init__()
        self.function, self.keywords = function, keywords
        self.weights = torch.nn.ParameterList(torch.nn.Parameter(w.float(), requires_grad=False) for w in weights)

    def forward(self, *inputs):
        return self.function(*inputs, *self.weights, **self.keywords)


def missing(name):
    """Why the contender ``name`` cannot run here, or None."""
    absent = [package for package in PACKAGES[name] if importlib.util.find_spec(package) is None]
    return f"{' and '.join(absent)} not installed (pip install .[rivals])" if absent else None


def contenders(module, inputs, dtype, only=tuple(PACKAGES)):
    """({name: call}, {name: why it was left out}) of inference in ``dtype``, of the names in ``only``.

    ``module`` takes ``inputs`` in float32. Calls take nothing and return tensors.
    """
    calls, left_out = {}, {}
    inputs = [t.detach().to(dtype if t.is_floating_point() else t.dtype).contiguous() for t in inputs]
    for name in only:
        reason = missing(name) if name in ASKED else "IPT_FAST_BENCH_RUNTIMES does not name it"
        if name == "onnxruntime" and dtype != torch.float32:
            reason = reason or f"it has no kernels in {str(dtype).removeprefix('torch.')} for CPUs"
        if reason is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of exports: deprecations inside of torch and onnxscript
                if name == "onnxruntime":
                    calls[name] = onnx_runtime(module, inputs)
                else:
                    calls[name] = openvino(module, inputs, dtype, dynamic="dynamic" in name)
        else:
            left_out[name] = reason
    return calls, left_out


def export(module, inputs, dynamic=False):
    """The graph of ``module`` in float32; with ``dynamic`` batches, heights and widths are free."""
    return once(module, ("graph", sizes_of(inputs, dynamic)), lambda: _export(module, inputs, dynamic))


def sizes_of(inputs, dynamic):
    """The shapes of ``inputs``, with -1 for what is free."""
    return tuple(
        tuple(-1 if dynamic and axis in free_axes(t) else size for axis, size in enumerate(t.shape)) for t in inputs
    )


def _export(module, inputs, dynamic):
    examples, sizes = tuple(t.float() if t.is_floating_point() else t for t in inputs), None
    if dynamic:
        sizes = tuple(dict.fromkeys(free_axes(t), torch.export.Dim.DYNAMIC) for t in inputs)
        # Larger ones: an axis as long as a window, or of length 1, would be taken for fixed.
        factors = {0: 2, 2: 2, 3: 3}
        examples = tuple(
            torch.empty([factors[axis] * n if axis in free_axes(t) else n for axis, n in enumerate(t.shape)])
            for t in inputs
        )
        sizes = (sizes,) if isinstance(module, Baked) else sizes  # which takes any number of inputs
    with torch.no_grad():
        return torch.export.export(module, examples, dynamic_shapes=sizes, strict=False)


def free_axes(t):
    """Axes that differ from call to call: the batch, of images height and width."""
    return (0, 2, 3) if t.dim() == 4 else (0,)


def openvino(module, inputs, dtype, dynamic=False):
    """A call in OpenVINO that computes in ``dtype`` and takes and returns it; with ``dynamic`` sizes stay free."""
    import openvino
    from openvino.preprocess import PrePostProcessor

    Type = openvino.Type
    kinds = {torch.float32: Type.f32, torch.bfloat16: Type.bf16, torch.int64: Type.i64}
    graph, shapes = export(module, inputs, dynamic), sizes_of(inputs, dynamic)
    model = once(module, ("openvino", shapes), lambda: openvino.convert_model(graph)).clone()
    for port, shape in zip(model.inputs, shapes, strict=True):
        port.get_node().set_partial_shape(openvino.PartialShape(list(shape)))
    model.validate_nodes_and_infer_types()
    ends = PrePostProcessor(model)
    for i, t in enumerate(inputs):
        ends.input(i).tensor().set_element_type(kinds[t.dtype])
    for i in range(len(model.outputs)):
        ends.output(i).tensor().set_element_type(kinds[dtype])
    options = {
        "INFERENCE_PRECISION_HINT": {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype],
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    request = openvino.compile_model(ends.build(), "CPU", options).create_infer_request()
    # numpy has no bfloat16: its bits go in and come out as integers of 16 bits.
    bits = [t.view(torch.int16) if t.dtype == torch.bfloat16 else t for t in inputs]
    given = [
        openvino.Tensor(b.numpy(), openvino.Shape(list(t.shape)), kinds[t.dtype])
        for b, t in zip(bits, inputs, strict=True)
    ]

    def call():
        found = request.infer(given, share_inputs=True, share_outputs=True)
        outs = [torch.from_numpy(value.view("int16") if dtype == torch.bfloat16 else value) for value in found.values()]
        return _as_returned([out.view(dtype) for out in outs])

    return call


def onnx_runtime(module, inputs):
    """A call in ONNX Runtime, in float32."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")  # or its threads disturb whose turn is next
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        path = str(pathlib.Path(folder) / "model.onnx")
        torch.onnx.export(export(module, inputs), f=path, dynamo=True, verbose=False, optimize=False)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    given = {name: onnxruntime.OrtValue.ortvalue_from_numpy(t.numpy()) for name, t in zip(names, inputs, strict=True)}
    outputs = [each.name for each in session.get_outputs()]

    def call():
        found = session.run_with_ort_values(outputs, given)
        return _as_returned([torch.from_numpy(value.numpy()) for value in found])

    return call


def _as_returned(outs):
    return outs[0] if len(outs) == 1 else tuple(outs)
