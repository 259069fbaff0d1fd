"""What users do to an accelerated model works as on the plain one; and all of it can be taken back."""

import copy
import dataclasses
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint

import ipt_fast
from ipt_fast.acceleration import core
from ipt_fast.acceleration.accelerated import Accelerated, reason_against
from ipt_fast.acceleration.rules import RULES, rule_named
from tests.acceleration.architectures import HAT_S, LIGHT, SPANDREL, build
from tests.modules.changed import Adapter, assert_close, replace

BLOCK = "layers.0.residual_group.blocks.1"
PARTS = ["", ".norm1", ".attn", ".attn.qkv", ".attn.proj", ".attn.softmax", ".norm2", ".mlp", ".mlp.fc1", ".mlp.act"]


def swinir(**options):
    return build(SPANDREL, "SwinIR", **(LIGHT | dict(upscale=2, upsampler="pixelshuffledirect") | options))


@pytest.fixture
def models():
    """(plain, accelerated): the same weights in two models, and an image."""
    plain = swinir()
    accelerated = copy.deepcopy(plain)
    report = ipt_fast.accelerate(accelerated, verify=False)
    assert len(report.accelerated) == 2
    return plain, accelerated, report, torch.rand(1, 3, 8, 16)


def blocks(model):
    return [module for module in model.modules() if type(module).__name__.endswith("SwinTransformerBlock")]


def runs(model):
    """Whether each block runs on the operators."""
    return [isinstance(block, Accelerated) and reason_against(block) is None for block in blocks(model)]


def assert_equal_models(plain, other, x):
    with torch.no_grad():
        assert_close(other(x), plain(x))


def test_only_classes_change(models):
    plain, accelerated, report, x = models
    modules, parameters = list(accelerated.modules()), list(accelerated.parameters())
    states = [{**module.__dict__} for module in modules]
    assert accelerated.state_dict().keys() == plain.state_dict().keys()
    assert str(accelerated) == str(plain)
    assert_equal_models(plain, accelerated, x)
    report.undo()
    assert [type(module) for module in accelerated.modules()] == [type(module) for module in plain.modules()]
    assert all(a is b for a, b in zip(accelerated.modules(), modules, strict=True))
    assert all(a is b for a, b in zip(accelerated.parameters(), parameters, strict=True))
    assert [module.__dict__ for module in modules] == states
    with torch.no_grad():
        assert torch.equal(accelerated(x), plain(x))
    report.undo()  # again: nothing


def test_a_table(models):
    plain, accelerated, report, x = models
    report.undo()
    report = ipt_fast.accelerate(accelerated, example=x, time=True)
    assert all(0 <= row.error <= row.allowed < 1e-5 for row in (*report.rows, report.whole))
    assert all(row.before > 0 and row.after > 0 for row in (*report.rows, report.whole))
    text = str(report)
    assert BLOCK in text and "2 of 2 known modules" in text and "SwinIR block" in text
    assert ipt_fast.explain(accelerated) == {f"{row.path}.SwinIR block": None for row in report.rows}


def test_accelerating_twice_and_undoing_in_any_order(models):
    plain, accelerated, first, x = models
    second = ipt_fast.accelerate(accelerated, example=x)
    assert [row.reason for row in second.rows] == ["accelerated before"] * 2
    second.undo()
    assert runs(accelerated) == [True, True]
    first.undo()
    assert runs(accelerated) == [False, False]
    assert [type(module) for module in accelerated.modules()] == [type(module) for module in plain.modules()]


def wrong(factor):
    rule = rule_named("SwinIR block")
    return dataclasses.replace(rule, name="wrong", forward=lambda *args: factor * rule.forward(*args))


@pytest.mark.parametrize("factor", [1 + 1e-4, float("nan")])
def test_a_wrong_rule_is_refused_and_the_model_is_as_it_was(models, factor, monkeypatch):
    plain, accelerated, report, x = models
    report.undo()
    accelerated.train()
    accelerated.norm.eval()
    hook = accelerated.register_forward_hook(lambda *_: None)
    modes = [module.training for module in accelerated.modules()]
    states = [{**module.__dict__} for module in accelerated.modules()]
    good = dataclasses.replace(
        rule_named("SwinIR block"), misfit=lambda block: None if block.shift_size else "not shifted"
    )
    monkeypatch.setattr(core, "RULES", (good, wrong(factor)))  # the second block, which comes first, is well
    message = rf"{BLOCK[:-1]}0 \(SwinTransformerBlock\) by the rule 'wrong' has an error of .* allows 9\.5e-07"
    with pytest.raises(ValueError, match=message):
        ipt_fast.accelerate(accelerated, example=x)
    assert [type(module) for module in accelerated.modules()] == [type(module) for module in plain.modules()]
    assert [module.training for module in accelerated.modules()] == modes
    mean = accelerated.mean  # which its forward sets anew
    assert [{**module.__dict__, "mean": mean} for module in accelerated.modules()] == [
        {**state, "mean": mean} for state in states
    ]
    hook.remove()
    with torch.no_grad():
        assert torch.equal(accelerated.eval()(x), plain(x))


def test_a_rule_that_fails_is_refused(models, monkeypatch):
    plain, accelerated, report, x = models
    report.undo()

    def fail(*_):
        raise RuntimeError("out of ideas")

    monkeypatch.setattr(core, "RULES", (dataclasses.replace(rule_named("SwinIR block"), forward=fail),))
    with pytest.raises(ValueError, match="cannot be verified, and the model is as it was: RuntimeError: out of ideas"):
        ipt_fast.accelerate(accelerated, example=x)
    assert [type(module) for module in accelerated.modules()] == [type(module) for module in plain.modules()]


def test_what_does_not_fit_is_left_and_told(models):
    plain, _, _, x = models
    changed = copy.deepcopy(plain)
    changed.get_submodule(BLOCK).attn.qkv = Adapter(changed.get_submodule(BLOCK).attn.qkv)
    report = ipt_fast.accelerate(changed, example=x)
    assert [row.reason for row in report.rows] == [None, "its qkv is a Adapter"]
    assert "left: its qkv is a Adapter" in str(report) and runs(changed) == [True, False]

    class SwinTransformerBlock(nn.Module):
        def forward(self, x):
            return x

    other = nn.Sequential(nn.Conv2d(3, 3, 1), SwinTransformerBlock())
    report = ipt_fast.accelerate(other)
    assert report.rows[0].reason == "its forward takes x" and not report.accelerated


@pytest.mark.parametrize("part", PARTS)
def test_hooks_of_every_part(models, part):
    plain, accelerated, report, x = models
    with torch.no_grad():
        before, seen = accelerated(x), []
        handle = accelerated.get_submodule(BLOCK + part).register_forward_hook(
            lambda module, inputs, output: seen.append(module) or 1.25 * output
        )
        other = plain.get_submodule(BLOCK + part).register_forward_hook(lambda module, inputs, output: 1.25 * output)
        assert_close(accelerated(x), plain(x))
        assert len(seen) == 1 and runs(accelerated) == [True, part == ""]
        report.undo()  # with the hook in place
        assert_close(accelerated(x), plain(x))
        handle.remove()
        other.remove()
        assert_close(accelerated(x), before)


def test_hooks_of_all_modules_and_backward_hooks(models):
    plain, accelerated, report, x = models
    seen = set()
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.add(module))
    try:
        assert_equal_models(plain, accelerated, x)
    finally:
        handle.remove()
    assert seen >= set(accelerated.get_submodule(BLOCK).modules()) - {accelerated.get_submodule(BLOCK).attn.proj_drop}
    seen = []
    accelerated.get_submodule(BLOCK).mlp.fc1.register_full_backward_hook(lambda *_: seen.append(1))
    accelerated(x).sum().backward()
    assert seen == [1] and runs(accelerated) == [True, False]


CHANGES = {
    "lora": lambda block: replace(block, "attn.qkv", Adapter(block.attn.qkv)),
    "another class that is known": lambda block: replace(block, "norm1", nn.Identity()),
    "no bias": lambda block: replace(block, "mlp.fc1", nn.Linear(60, 120, bias=False)),
    "another activation": lambda block: replace(block, "mlp.act", nn.GELU("tanh")),
    "prune": lambda block: prune.l1_unstructured(block.mlp.fc2, "weight", amount=0.5),
    "weight norm": lambda block: nn.utils.parametrizations.weight_norm(block.attn.proj),
    "parametrised table": lambda block: parametrize.register_parametrization(
        block.attn, "relative_position_bias_table", nn.Tanh()
    ),
    "forward of a part": lambda block: setattr(block.mlp, "forward", lambda x: 2 * x),
    "forward": lambda block: setattr(block, "forward", lambda x, size: 2 * x),
    "another scale": lambda block: setattr(block.attn, "scale", 1.0),
    "another shift": lambda block: setattr(block, "shift_size", 0),
    "dropout": lambda block: (setattr(block.attn.attn_drop, "p", 1.0), block.attn.train()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_parts(models, change):
    """What is done after accelerate() counts: in the output, in gradients, and after undo()."""
    plain, accelerated, report, x = models
    with torch.no_grad():
        before = plain(x)
    for model in (plain, accelerated):
        torch.manual_seed(1)
        if change == "no bias":
            torch.manual_seed(2)
        CHANGES[change](model.get_submodule(BLOCK))
    assert_equal_models(plain, accelerated, x)
    with torch.no_grad():
        assert change == "weight norm" or (accelerated(x) - before).abs().max() > 1e-6
    grads = [
        torch.autograd.grad(model(x).square().sum(), [p for p in model.parameters()], allow_unused=True)
        for model in (plain, accelerated)
    ]
    for expected, found in zip(*grads, strict=True):
        assert (expected is None) == (found is None)
        assert expected is None or (found - expected).abs().max() <= 1e-4 * expected.abs().max() + 1e-6
    report.undo()
    with torch.no_grad():
        assert torch.equal(accelerated(x), plain(x))


def test_a_forward_replaced_in_a_class(models, monkeypatch):
    plain, accelerated, _, x = models
    for cls in (type(blocks(plain)[0]), type(blocks(plain)[0].attn), nn.Linear):
        original = cls.forward
        with monkeypatch.context() as patch:
            patch.setattr(
                cls, "forward", lambda self, *args, _run=original, **kwargs: 1.5 * _run(self, *args, **kwargs)
            )
            assert runs(accelerated) == [False, False]
            assert_equal_models(plain, accelerated, x)
        assert runs(accelerated) == [True, True]


def test_a_parametrised_block_is_undone(models):
    plain, accelerated, report, x = models
    for model in (plain, accelerated):
        block = model.get_submodule(BLOCK)
        block.register_parameter("spare", nn.Parameter(torch.zeros(1)))
        parametrize.register_parametrization(block, "spare", nn.Tanh())
    assert_equal_models(plain, accelerated, x)
    report.undo()
    block = accelerated.get_submodule(BLOCK)
    assert not isinstance(block, Accelerated) and parametrize.is_parametrized(block, "spare")
    parametrize.remove_parametrizations(block, "spare")
    assert type(block) is type(blocks(accelerated)[0])


def test_copies_and_pickles(models):
    plain, accelerated, report, x = models
    file = io.BytesIO()
    torch.save(accelerated, file)
    file.seek(0)
    copies = [copy.deepcopy(accelerated), pickle.loads(pickle.dumps(accelerated)), torch.load(file, weights_only=False)]
    copies.append(accelerated._replicate_for_data_parallel())
    report.undo()
    assert runs(accelerated) == [False, False]
    assert runs(pickle.loads(pickle.dumps(plain))) == [False, False]
    for other in copies[:3]:
        assert runs(other) == [True, True]
        assert_equal_models(plain, other, x)
        assert not {p.data_ptr() for p in other.parameters()} & {p.data_ptr() for p in plain.parameters()}
    with pytest.raises(ValueError, match="name must be that of a rule"):
        rule_named("none such")


def test_a_replica_of_data_parallel(models):
    plain, accelerated, _, x = models
    block = blocks(accelerated)[0]
    replica = block._replicate_for_data_parallel()
    assert type(replica) is type(block)
    tokens = torch.rand(1, 64, 60)
    with torch.no_grad():
        assert torch.equal(replica(tokens, (8, 8)), block(tokens, (8, 8)))


def test_moves_and_dtypes(models):
    plain, accelerated, report, x = models
    assert_equal_models(plain.double(), accelerated.double(), x.double())
    for dtype in (torch.bfloat16, torch.float16):
        out = accelerated.to(dtype)(x.to(dtype))
        assert out.dtype == dtype and runs(accelerated) == [True, True]
    out = accelerated.float().to("meta")(x.to("meta"))
    assert out.shape == (1, 3, 16, 32)
    with pytest.raises(ValueError, match="verify must be False for a model on the meta device"):
        report.undo() or ipt_fast.accelerate(accelerated)
    ipt_fast.accelerate(accelerated, verify=False)
    assert runs(accelerated) == [True, True]


def test_autocast_gives_the_dtypes_of_the_plain_model(models):
    plain, accelerated, _, x = models
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        tokens = torch.rand(1, 128, 60)
        for own, other in zip(blocks(plain), blocks(accelerated), strict=True):
            assert own(tokens, (8, 16)).dtype == other(tokens, (8, 16)).dtype == torch.float32
        out, expected = accelerated(x), plain(x)
    assert out.dtype == expected.dtype
    assert (out - expected).abs().max() <= 0.05 * expected.abs().max()


def test_stochastic_depth_is_a_gate(models):
    """Drawn as the plain model draws it, so that the same seed keeps the same branches."""
    plain, accelerated, _, x = models
    outs = []
    for model in (plain.train(), accelerated.train()):
        torch.manual_seed(3)
        outs.append(model(x).detach())
    assert_close(outs[1], outs[0])
    assert runs(accelerated) == [True, True]
    quiet = swinir(drop_path_rate=0.0).train()
    ipt_fast.accelerate(quiet, verify=False)
    assert runs(quiet) == [True, True]


def test_shared_modules_and_parameters(models):
    plain, _, _, x = models
    group = plain.layers[0].residual_group
    group.blocks.append(group.blocks[0])
    group.blocks[1].mlp.fc1.weight = group.blocks[0].mlp.fc1.weight
    accelerated = copy.deepcopy(plain)
    report = ipt_fast.accelerate(accelerated, example=x)
    assert len(report.rows) == 2
    assert_equal_models(plain, accelerated, x)
    inside = accelerated.layers[0].residual_group.blocks
    assert inside[2] is inside[0] and inside[1].mlp.fc1.weight is inside[0].mlp.fc1.weight


def test_checkpointing(models):
    plain, accelerated, _, x = models
    with torch.enable_grad():
        expected = torch.autograd.grad(accelerated(x).square().sum(), list(accelerated.parameters()))
        tokens = [torch.rand(1, 64, 60, requires_grad=True) for _ in range(2)]
        block = blocks(accelerated)[0]
        out = checkpoint(block, tokens[0], (8, 8), use_reentrant=False)
        out.sum().backward()
    assert tokens[0].grad is not None and all(grad is not None for grad in expected)


@pytest.mark.parametrize("first", ["accelerate", "fully_shard"])
def test_fsdp(models, first, tmp_path):
    from torch.distributed.fsdp import FSDPModule, fully_shard

    plain, accelerated, report, x = models
    wanted = torch.autograd.grad(plain(x).square().sum(), list(plain.parameters()))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        if first == "fully_shard":
            report.undo()
        for module in (*blocks(accelerated), accelerated):
            fully_shard(module, mesh=mesh)
        sharded = [type(block) for block in blocks(accelerated)]
        if first == "fully_shard":
            with pytest.raises(ValueError, match="cannot be copied.*verify=False"):
                ipt_fast.accelerate(accelerated, example=x)
            assert [type(block) for block in blocks(accelerated)] == sharded
            report = ipt_fast.accelerate(accelerated, verify=False)
            assert len(report.accelerated) == 2
        ran = []
        handles = [
            block.register_forward_pre_hook(lambda module, inputs: ran.append(reason_against(module)))
            for block in blocks(accelerated)
        ]
        out = accelerated(x)
        for handle in handles:
            handle.remove()
        assert ran == [None, None] and all(isinstance(block, FSDPModule) for block in blocks(accelerated))
        assert_close(out.detach(), plain(x).detach())
        out.square().sum().backward()
        for parameter, grad in zip(accelerated.parameters(), wanted, strict=True):
            assert (parameter.grad.full_tensor() - grad).abs().max() <= 1e-4 * grad.abs().max() + 1e-6
        report.undo()
        kinds = [type(block) for block in blocks(accelerated)]
        assert not any(issubclass(kind, Accelerated) for kind in kinds)
        assert all(issubclass(kind, FSDPModule) for kind in kinds)
        assert first == "accelerate" or kinds == sharded
        with torch.no_grad():
            assert torch.equal(accelerated(x), plain(x))
    finally:
        torch.distributed.destroy_process_group()


def test_a_frozen_form(models):
    plain, accelerated, _, x = models
    frozen = ipt_fast.freeze(accelerated)
    with torch.no_grad():
        assert_close(frozen(x), plain(x))
    assert set(ipt_fast.explain(frozen).values()) == {None}


def test_a_frozen_form_with_convolutions_inside():
    """The packed form leaves alone what a rule reads, and packs what it calls."""
    model = build(SPANDREL, "HAT", **HAT_S, upscale=2, upsampler="pixelshuffle")
    x = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        expected = model(x)
        ipt_fast.accelerate(model, verify=False)
        frozen = ipt_fast.freeze(model)
        assert_close(frozen(x), expected)
    for module in (frozen._plain, *(packed for _, packed in [frozen._packed or (None, frozen._plain)])):
        assert [reason_against(block) for block in module.modules() if isinstance(block, Accelerated)] == [None] * 3


@pytest.mark.filterwarnings("ignore")
def test_one_graph_under_compile(models):
    plain, accelerated, _, x = models
    torch._dynamo.reset()
    out = torch.compile(accelerated, backend="aot_eager", fullgraph=True)(x)
    assert_close(out.detach(), plain(x).detach())
    found = torch.autograd.grad(out.square().sum(), list(accelerated.parameters()))
    wanted = torch.autograd.grad(plain(x).square().sum(), list(plain.parameters()))
    assert all((a - b).abs().max() <= 1e-4 * b.abs().max() + 1e-6 for a, b in zip(found, wanted, strict=True))
    block, tokens = blocks(accelerated)[1], torch.rand(1, 128, 60)
    with torch.no_grad():
        expected = block(tokens, (8, 16))
        block.compile(backend="aot_eager", fullgraph=True)
        assert_close(block(tokens, (8, 16)), expected)


def test_a_model_without_known_modules_is_left():
    model = nn.Conv2d(3, 3, 1)
    report = ipt_fast.accelerate(model)
    assert report.rows == [] and "0 of 0 known modules" in str(report)
    report.undo()
    with pytest.raises(TypeError, match="model must be a torch.nn.Module or a descriptor of spandrel; got int"):
        ipt_fast.accelerate(3)
    with pytest.raises(ValueError, match="time must be False"):
        ipt_fast.accelerate(model, verify=False, time=True)


def test_a_model_that_does_not_run_in_float64_says_so(models):
    plain, *_ = models
    model = nn.Sequential(plain, nn.Identity())
    model[1].forward = lambda x: nn.functional.conv2d(x, torch.ones(1, 3, 1, 1))  # of float32
    with pytest.raises(ValueError, match="does not run on the example in float64.*verify=False"):
        ipt_fast.accelerate(model)
    with pytest.raises(ValueError, match="does not run on the example in float64"):
        ipt_fast.accelerate(plain, example=torch.rand(1, 5, 16, 16))


def test_names_of_rules_are_unique():
    assert len({rule.name for rule in RULES}) == len(RULES)
