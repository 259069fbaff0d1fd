"""Plain twins: the same function and state dict by PyTorch's own operations, exported with dynamic sizes."""

import pytest
import torch
from torch.export import Dim, export
from torch.utils._python_dispatch import TorchDispatchMode

import ipt_fast
from tests.models.micro import micro_model
from tests.models.small_restormer import small_restormer
from tests.modules.changed import ipt

SHALLOW = {"depths": (2, 0, 0, 0)}
# Whole windows and lattices at every level: what holds for such a size only must not be built in.
TRACED = (2, 3, 24, 48)
OTHERS = [(2, 24, 48), (1, 16, 9), (3, 13, 41), (1, 70, 9), (1, 9, 130)]
BUILD = {
    "training": lambda: micro_model(**SHALLOW),
    "merged": lambda: micro_model(merged=True),
    "with bias": lambda: micro_model(merged=True, norm="with_bias", in_channels=6),
    "restormer": lambda: small_restormer(depths=(1, 1, 1, 1), refinement=0),
    "restormer in windows": lambda: small_restormer(depths=(1, 1, 1, 1), refinement=0, training_patch=8),
    "ipt": ipt,
    "ipt sr": lambda: ipt_fast.create_model(
        "ipt_tiny", tasks=("sr_x2",), features=4, layers=1, heads=3, image_size=12, pos_every=True
    ).eval(),
    "ipt without norms": lambda: ipt_fast.create_model(
        "ipt_tiny", tasks=("derain",), features=4, layers=1, heads=3, image_size=12, no_norm=True
    ).eval(),
}


class Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.namespaces = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.namespaces.add(func.namespace)
        return func(*args, **(kwargs or {}))


def image(model, batch=2, height=24, width=40):
    size = getattr(model.config, "image_size", None)
    return torch.rand(batch, model.config.in_channels, size or height, size or width)


def assert_close(value, expected):
    assert value.shape == expected.shape
    assert (value - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize("form", BUILD)
def test_same_function_and_state_by_pytorch_alone(form):
    model = BUILD[form]()
    twin, x = model.to_reference(), image(model)
    assert type(twin) is type(model) and twin.config == model.config and twin.training == model.training
    assert twin.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in twin.state_dict().items())
    with Watch() as watch:
        out = twin(x)
        (grad,) = torch.autograd.grad(out.square().sum(), [next(p for p in twin.parameters() if p.requires_grad)])
    assert not {name for name in watch.namespaces if name.startswith("ipt_fast")} and grad.any()
    assert_close(out.detach(), model(x).detach())
    reasons = ipt_fast.explain(twin)
    assert reasons and set(reasons.values()) == {"it is a plain twin"}
    with torch.no_grad():  # a copy
        next(twin.parameters()).add_(1)
    assert not torch.equal(next(twin.parameters()), next(model.parameters()))
    assert set(ipt_fast.explain(model).values()) == {None}


def test_the_twin_of_a_training_form_can_be_merged_and_loaded(tmp_path):
    model = micro_model()
    twin = model.to_reference()
    twin.reparameterize()
    x = image(model)
    assert_close(twin(x).detach(), model(x).detach())
    twin.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert set(ipt_fast.explain(again).values()) == {None}  # what is saved is the model


def test_one_task_of_a_twin_is_a_twin():
    model = ipt_fast.create_model("ipt_tiny", pretrained=True)
    twin, x = model.to_reference().only("derain"), torch.rand(1, 3, 48, 48)
    assert set(ipt_fast.explain(twin).values()) == {"it is a plain twin"}
    with torch.no_grad():
        assert_close(twin(x), model(x, "derain"))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("form", ["training", "ipt", pytest.param("restormer", marks=pytest.mark.slow)])
def test_exported_graphs_hold_pytorch_operations_only(form, strict):
    model = BUILD[form]()
    x = image(model)
    program = export(model.to_reference(), (x,), strict=strict)
    assert not [node for node in program.graph.nodes if "ipt_fast" in str(node.target)]
    assert_close(program.module()(x).detach(), model(x).detach())


def dynamic_shapes(model):
    axes = (
        {0: Dim("batch")} if hasattr(model.config, "image_size") else {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    )
    return {"x": axes}


def check_runtimes(model, traced, sizes, folder):
    onnxruntime, openvino = pytest.importorskip("onnxruntime"), pytest.importorskip("openvino")
    pytest.importorskip("onnxscript")
    names = dict(input_names=["image"], output_names=["restored"])
    twin, path = model.to_reference(), str(folder / "model.onnx")
    torch.onnx.export(twin, (traced,), path, dynamo=True, dynamic_shapes=dynamic_shapes(model), verbose=False, **names)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    compiled = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for size in sizes:
        x = torch.rand(size)
        with torch.no_grad():
            expected = model(x)
        assert_close(torch.from_numpy(session.run(None, {"image": x.numpy()})[0]), expected)
        assert_close(torch.from_numpy(compiled([x.numpy()])[0].copy()), expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["ipt_v2", pytest.param("restormer", marks=pytest.mark.slow)])
def test_onnx_of_any_size(form, tmp_path):
    model = micro_model(merged=True, **SHALLOW) if form == "ipt_v2" else BUILD[form]()
    check_runtimes(model, torch.rand(TRACED), [(batch, 3, *size) for batch, *size in OTHERS], tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["ipt", *(pytest.param(f, marks=pytest.mark.slow) for f in BUILD if "ipt " in f)])
def test_onnx_of_ipt_of_any_batch(form, tmp_path):
    model = BUILD[form]()
    check_runtimes(model, image(model), [(batch, 3, 12, 12) for batch in (2, 1, 5, 40)], tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["ipt_v2_tiny", "ipt_tiny"])
def test_onnx_of_the_shipped_models(name, tmp_path):
    model = ipt_fast.create_model(name, pretrained=True)
    if name == "ipt_tiny":
        model = model.only("denoise50").eval()
        sizes = [(batch, 3, 48, 48) for batch in (2, 1, 9)]
    else:
        model.reparameterize()
        sizes = [(1, 3, 64, 72), (2, 3, 181, 237), (1, 3, 33, 300)]
    check_runtimes(model, torch.rand(2, 3, *((48, 48) if name == "ipt_tiny" else (256, 320))), sizes, tmp_path)
