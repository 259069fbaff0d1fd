"""IPT: the published shapes and keys, agreement with two other formulations, tasks, checkpoints, bad input."""

import dataclasses

import numpy
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import ipt_fast
from ipt_fast.models.ipt import IPT, TASKS, IPTConfig
from tests.ops.cases import error
from tests.oracles import naive_ipt
from tests.oracles.public import public_module

SMALL = dict(tasks=TASKS, image_size=12, patch_size=3, features=4, layers=2, heads=3)
OPTIONS = [
    {},
    {"no_norm": True},
    {"no_pos": True},
    {"pos_every": True},
    {"no_mlp": True},
    {"image_size": 16, "patch_size": 4, "features": 3, "heads": 6},
]


def small(**options):
    torch.manual_seed(0)
    return ipt_fast.create_model("ipt", **{**SMALL, **options}).eval()


def image(model, batch=2):
    return torch.rand(batch, 3, model.config.image_size, model.config.image_size) * 255


@pytest.mark.parametrize(("tasks", "millions"), [(("denoise50",), 115.313), (TASKS, 118.892)])
def test_parameters_of_the_published_models(tasks, millions):
    with torch.device("meta"):
        model = ipt_fast.create_model("ipt", tasks=tasks)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == millions


def test_multiplications_of_the_published_model():
    with torch.device("meta"):
        model, x = ipt_fast.create_model("ipt"), torch.empty(32, 3, 48, 48)
    with FlopCounterMode(display=False) as counter:
        model(x)
    assert 32.5e9 < counter.get_total_flops() / 2 / len(x) < 33.5e9


def test_the_published_keys():
    names = set(small(layers=1).state_dict())
    ours = {f"{part}.{kind}" for part in ("sub_mean", "add_mean") for kind in ("weight", "bias")}
    blocks = ["0", "1.body.0", "1.body.2", "2.body.0", "2.body.2"]
    ours |= {f"head.{i}.{block}.{kind}" for i in range(6) for block in blocks for kind in ("weight", "bias")}
    tails = [f"{i}.1" for i in range(6)] + ["0.0.0", "1.0.0", "2.0.0", "2.0.2"]
    ours |= {f"tail.{tail}.{kind}" for tail in tails for kind in ("weight", "bias")}
    linear = ["linear_encoding", "mlp_head.0", "mlp_head.3"]
    for part, norms in (("encoder", 2), ("decoder", 3)):
        linear += [f"{part}.layers.0.{name}" for name in ("linear1", "linear2")]
        linear += [f"{part}.layers.0.norm{i + 1}" for i in range(norms)]
    ours |= {f"body.{name}.{kind}" for name in linear for kind in ("weight", "bias")}
    for attention in ("encoder.layers.0.self_attn", "decoder.layers.0.self_attn", "decoder.layers.0.multihead_attn"):
        ours |= {f"body.{attention}.in_proj_weight", f"body.{attention}.out_proj.weight"}
    ours |= {"body.query_embed.weight", "body.position_encoding.pe.weight", "body.position_encoding.position_ids"}
    assert names == ours


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ",".join(o) or "published")
def test_agreement_with_the_naive_formulation(options):
    model = small(**options).double()
    x, state = image(model).double(), model.state_dict()
    for task in range(6):
        got = model(x, TASKS[task])
        for each, out in zip(x, got, strict=True):
            expected = naive_ipt.forward(state, model.config, each, task)
            assert (out - expected).abs().max() < 1e-9 * 255


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ",".join(o) or "published")
def test_agreement_with_the_published_implementation(options):
    published = public_module("spandrel.architectures.IPT.__arch.ipt").IPT
    model = small(**options)
    config = model.config
    flags = {name: getattr(config, name) for name in ("no_norm", "no_pos", "pos_every")}
    other = published(
        patch_size=config.image_size,
        patch_dim=config.patch_size,
        n_feats=config.features,
        scale=[2, 3, 4, 1, 1, 1],
        num_heads=config.heads,
        num_layers=config.layers,
        num_queries=6,
        mlp=not config.no_mlp,
        **flags,
    ).eval()
    other.load_state_dict(model.state_dict(), strict=True)
    x = image(model)
    for task in range(6):
        other.set_scale(task)
        with torch.no_grad():
            assert (model(x, task) - other(x)).abs().max() < 1e-5 * 255


def test_without_a_task_embedding():
    model = small(task_embedding=False).double()
    assert "body.query_embed.weight" not in model.state_dict()
    x = image(model).double()
    expected = naive_ipt.forward(model.state_dict(), model.config, x[0], 3)
    assert (model(x, "derain")[0] - expected).abs().max() < 1e-9 * 255


def gradient_errors(model, x, task):
    """{name: error} of the gradients of the image and of every parameter, against autograd of the naive formulation."""
    index = TASKS.index(task)
    grad = torch.randn(model(x[:1], task).shape, dtype=x.dtype)
    model.zero_grad()
    x = x.clone().requires_grad_()
    model(x, task).backward(grad.expand(len(x), -1, -1, -1))
    state = {
        name: value.clone().requires_grad_(value.is_floating_point()) for name, value in model.state_dict().items()
    }
    images = x.detach().clone().requires_grad_()
    for each in images:
        naive_ipt.forward(state, model.config, each, index).backward(grad[0])
    errors = {"x": error(x.grad, images.grad)}
    for name, parameter in model.named_parameters():
        part, number = name.split(".")[:2]
        used = part not in ("head", "tail") or int(number) == index
        assert (parameter.grad is not None) == (used and parameter.requires_grad), name
        if parameter.grad is not None:
            errors[name] = error(parameter.grad, state[name].grad)
    return errors


@pytest.mark.parametrize("task", ["sr_x2", "sr_x3", "sr_x4", "derain"])
def test_gradients(task):
    """Unlike finite differences, whose noise is that of the output over the step, both sides round in float64 only."""
    model = small(layers=1, features=2, heads=3, image_size=6).double()
    x = image(model).double()
    assert max(gradient_errors(model, x, task).values()) < 1e-11
    parameter = model.body.encoder.layers[0].linear1.weight
    parameter.register_hook(lambda gradient: gradient * (1 + 1e-9))
    errors = gradient_errors(model, x, task)
    assert errors.pop("body.encoder.layers.0.linear1.weight") > 1e-10 > max(errors.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_of_the_whole_range(dtype):
    model = small(features=8, heads=6)
    x = image(model)
    x[0], x[1] = 0, 255
    truth = model(x, "denoise30")
    with torch.autocast("cpu", dtype):
        got = model(x, "denoise30")
    assert got.dtype == torch.float32 and got.isfinite().all() and (got - truth).abs().max() < 0.02 * 255
    assert (model.to(dtype)(x.to(dtype), "denoise30") - truth).abs().max() < 0.04 * 255


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ",".join(o) or "published")
def test_sums_of_the_layers_stay_in_float32(options):
    model, seen = small(**options), []
    for layer in (*model.body.encoder.layers, *model.body.decoder.layers):
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(image(model), 0)
    assert set(seen) == {torch.float32} and len(seen) == 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_other_weights_than_float32_under_autocast(dtype, autocast):
    model = small()
    x = image(model)
    expected = model(x, 0)
    with torch.autocast("cpu", autocast):
        found = model.to(dtype)(x.to(dtype), 0)
    assert found.dtype == dtype and (found - expected).abs().max() < (1e-4 if dtype == torch.float64 else 0.05) * 255


def test_operations_are_counted_without_gradients():
    model = small()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image(model), 0)
    with FlopCounterMode(display=False) as with_gradients:
        model(image(model), 0)
    assert counter.get_total_flops() == with_gradients.get_total_flops() > 0


def test_an_empty_batch():
    model = small()
    assert model(image(model, 0), "sr_x3").shape == (0, 3, 36, 36)


@pytest.mark.parametrize("grad", [False, True])
def test_a_cpu_infers_in_parts(monkeypatch, grad):
    model, seen = small(), []
    x = image(model, batch=5)
    model.body.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    with torch.set_grad_enabled(grad):
        whole = model(x, "sr_x2")
        monkeypatch.setattr(ipt_fast.models.ipt, "PART_TOKENS", 3 * model.config.tokens - 1)
        parts = model(x, "sr_x2")
    assert seen == ([5, 5] if grad else [5, 2, 2, 1])
    assert (parts - whole).abs().max() < 1e-5 * 255


def test_the_published_tiles_are_inferred_by_sixteen():
    model, seen = ipt_fast.create_model("ipt_tiny").eval(), []
    model.body.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    with torch.no_grad():
        model(image(model, batch=20), "derain")
    assert seen == [16, 4]


@pytest.mark.parametrize("name", ["head.0.0.weight", "tail.0.0.0.weight", "body.encoder.layers.0.linear1.weight"])
def test_damaged_files(tmp_path, name):
    for value in (torch.zeros(3), torch.zeros(0, 0, 0, 0)):
        torch.save({**small().state_dict(), name: value}, tmp_path / "ipt.pt")
        with pytest.raises(ValueError, match=f"path must hold an IPT; got .*{name} has shape"):
            IPT.from_checkpoint(tmp_path / "ipt.pt", heads=3)


def test_one_graph():
    """Of the forward and of a training step; any batch."""
    model = small(layers=1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for batch in (2, 3):
        x = image(model, batch)
        torch.testing.assert_close(compiled(x, "sr_x2"), model(x, "sr_x2"), rtol=1e-4, atol=1e-3)
        grads = []
        for call in (compiled, model):
            model.zero_grad()
            call(x, "sr_x2").square().mean().backward()
            grads.append(model.body.encoder.layers[0].linear1.weight.grad.clone())
        torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3 * grads[1].abs().max().item())


def test_the_deblurring_variant():
    """1024 tokens of 576 channels from 256 x 256 pixels (supplement, section 1)."""
    model = ipt_fast.create_model("ipt", tasks=("deblur",), image_size=256, patch_size=8, features=9, layers=1).eval()
    assert (model.config.tokens, model.config.dim) == (1024, 576)
    x = torch.rand(1, 3, 256, 256) * 255
    with torch.no_grad():
        maps = model.head[0](model.sub_mean(x))
        expected = naive_ipt.body(model.state_dict(), model.config, maps[0], 0)
        assert (model.forward_with_features(x)[1][0] - expected).abs().max() < 1e-5 * expected.abs().max()
        assert model(x).shape == x.shape


def test_one_task_of_several():
    model = small()
    for task in TASKS:
        one = model.only(task)
        assert one.config == dataclasses.replace(model.config, tasks=(task,))
        x = image(model)
        assert torch.equal(one(x), model(x, task))
    assert model.task_index(numpy.int64(4)) == 4


def test_saving_and_opening(tmp_path):
    model = small()
    model.save_pretrained(tmp_path)
    again, x = ipt_fast.models.open_model(tmp_path), image(model)
    assert again.config == model.config and not again.training
    assert torch.equal(again(x, 2), model(x, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value_range", [255.0, 1.0, 100.0])
def test_opening_files_of_half_precision(tmp_path, dtype, value_range):
    model = small(value_range=value_range).only("sr_x2")
    torch.save(model.to(dtype).state_dict(), tmp_path / "ipt.pt")
    given = {"value_range": 100.0} if value_range == 100 else {}
    assert IPT.from_checkpoint(tmp_path / "ipt.pt", heads=3, **given).config == model.config


@pytest.mark.parametrize("options", OPTIONS[:4] + OPTIONS[5:], ids=lambda o: ",".join(o) or "published")
def test_opening_published_files(tmp_path, options):
    model, path = small(**options), tmp_path / "ipt.pt"
    torch.save({"params": {f"module.{name}": value for name, value in model.state_dict().items()}}, path)
    given = {"pos_every": True} if options.get("pos_every") else {}
    opened = IPT.from_checkpoint(path, heads=model.config.heads, **given)
    assert opened.config == model.config
    one = model.only("sr_x3")
    torch.save(one.state_dict(), path)
    assert IPT.from_checkpoint(path, heads=one.config.heads, **given).config.tasks == ("sr_x3",)
    assert ipt_fast.load_checkpoint(model.only("sr_x3"), path)
    with pytest.raises(ValueError, match="path must fit this IPT; got"):
        ipt_fast.load_checkpoint(model, path)


def test_what_a_file_does_not_tell_is_not_guessed(tmp_path):
    path = tmp_path / "ipt.pt"
    torch.save(small().only("derain").state_dict(), path)
    with pytest.raises(TypeError, match="heads"):
        IPT.from_checkpoint(path)
    for heads in (None, 0, 3.0):
        with pytest.raises((ValueError, TypeError), match="heads must be an int of at least 1"):
            IPT.from_checkpoint(path, heads=heads, tasks="derain")
    with pytest.raises(ValueError, match="tasks must be given where tails .* whose tails magnify x1"):
        IPT.from_checkpoint(path, heads=3)
    with pytest.raises(ValueError, match="tasks must fit .* x1; got sr_x2"):
        IPT.from_checkpoint(path, heads=3, tasks="sr_x2")
    with pytest.raises(ValueError, match="heads must divide the 36 channels of a token; got 5"):
        IPT.from_checkpoint(path, heads=5, tasks="derain")
    assert IPT.from_checkpoint(path, heads=3, tasks="derain").config.tasks == ("derain",)
    torch.save(small(no_mlp=True, no_pos=True).state_dict(), path)
    with pytest.raises(ValueError, match="image_size must be given"):
        IPT.from_checkpoint(path, heads=3)
    assert IPT.from_checkpoint(path, heads=3, image_size=12).config.image_size == 12
    torch.save(small(value_range=1.0).only("sr_x2").state_dict(), path)
    assert IPT.from_checkpoint(path, heads=3).config.value_range == 1
    for name, wrong, right in (("value_range", 255.0, 1.0), ("layers", 3, 2), ("no_pos", True, False)):
        with pytest.raises(ValueError, match=f"{name} must be {right} as in .*; got {wrong}"):
            IPT.from_checkpoint(path, heads=3, **{name: wrong})
    state = small().only("sr_x2").state_dict()
    state["add_mean.bias"] = torch.tensor([1.0, 2.0, 3.0])  # of other data: the range is not told
    torch.save(state, path)
    for given, found in (({}, 255), ({"value_range": 9}, 9)):
        assert IPT.from_checkpoint(path, heads=3, **given).config.value_range == found
    torch.save({"conv.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="path must hold an IPT; got .*, which lacks head.0.0.weight"):
        IPT.from_checkpoint(path, heads=3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tasks": ()}, "tasks must be one or more names"),
        ({"tasks": "derain"}, "tasks must be one or more names"),
        ({"tasks": ("derain", "derain")}, "tasks must differ"),
        ({"tasks": ("sr_x8",)}, "tasks must magnify 2, 3, 4 times, or not"),
        ({"heads": 7}, "heads must divide the 576 channels"),
        ({"patch_size": 5}, "patch_size must divide image_size 48"),
        ({"layers": 0}, "layers must be an int of at least 1"),
        ({"value_range": 0}, "value_range must be a positive number"),
    ],
)
def test_bad_configs(fields, message):
    with pytest.raises(ValueError, match=message):
        IPTConfig(**fields)


def test_bad_input():
    model = small()
    for task in (None, 6, -1, True, 0.0):
        with pytest.raises(ValueError, match="task must be one of sr_x2, .* or a number below 6; got"):
            model(image(model), task)
    with pytest.raises(ValueError, match="task must be one of sr_x2, .*, denoise50; got 'dehaze'"):
        model(image(model), "dehaze")
    with torch.no_grad(), pytest.raises(ValueError, match=r"got \(17, 1, 12, 12\)"):
        model(torch.rand(17, 1, 12, 12), 0)
    with pytest.raises(ValueError, match=r"x must be \(B, 3, 12, 12\), ipt_fast.restore takes images of any size"):
        model(torch.rand(1, 3, 13, 12), 0)
    with pytest.raises(ValueError, match=r"x must be \(B, 3, H, W\)"):
        model(torch.rand(1, 1, 12, 12), 0)
    with pytest.raises(TypeError, match="config must be an IPTConfig"):
        IPT({})


def test_a_model_of_several_tasks_names_them():
    model, image = ipt_fast.create_model("ipt_tiny", pretrained=True), numpy.zeros((50, 60, 3), numpy.uint8)
    x = torch.zeros(1, 3, 48, 48)
    said = r"^task must be one of sr_x2, derain, denoise30, denoise50 or a number below 4; got none$"
    for call in (
        lambda: model(x),
        lambda: ipt_fast.freeze(model)(x),
        lambda: ipt_fast.restore(image, model),
        lambda: ipt_fast.Restorer(model),
        lambda: model.scale(),
    ):
        with pytest.raises(ValueError, match=said):
            call()
