"""What users do to an accelerated model works as on the plain one; and all of it can be taken back."""

import copy
import dataclasses
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import ipt_fast
from ipt_fast.acceleration import core
from ipt_fast.acceleration.accelerated import Accelerated
from ipt_fast.acceleration.rules import RULES, rule_named
from tests.acceleration.small import BLOCK, PARTS, assert_equal_models, blocks, runs, swinir, without_convolutions
from tests.modules.changed import Adapter, assert_close, replace


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
    assert BLOCK in text and "4 of 4 known modules" in text and "SwinIR block" in text
    assert ipt_fast.explain(accelerated) == {f"{row.path}.{row.rule}": None for row in report.rows}
    assert [row.rule for row in report.rows] == ["SwinIR block"] * 2 + ["dense convolution"] * 2


def test_accelerating_twice_and_undoing_in_any_order(models):
    plain, accelerated, first, x = models
    second = ipt_fast.accelerate(accelerated, example=x)
    assert [row.reason for row in second.rows] == ["accelerated before"] * 4
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
    assert [row.reason for row in without_convolutions(report.rows)] == [None, "its qkv is a Adapter"]
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
    assert len(without_convolutions(report.rows)) == 2
    assert_equal_models(plain, accelerated, x)
    inside = accelerated.layers[0].residual_group.blocks
    assert inside[2] is inside[0] and inside[1].mlp.fc1.weight is inside[0].mlp.fc1.weight


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

    def forward(x):
        if x.dtype == torch.float64:
            raise TypeError("float32 only")
        return x

    model[1].forward = forward
    with pytest.raises(ValueError, match="does not run on the example in float64.*verify=False"):
        ipt_fast.accelerate(model)
    with pytest.raises(ValueError, match="does not run on the example in float64"):
        ipt_fast.accelerate(plain, example=torch.rand(1, 5, 16, 16))


def test_what_a_forward_makes_in_float32_meets_float64_and_stays_float32(models):
    plain, *_ = models
    model, kept = nn.Sequential(plain, nn.Identity()), []

    def forward(x):
        kept.append(torch.ones(1, 3, 1, 1))
        return nn.functional.conv2d(x, kept[0])

    model[1].forward = forward
    assert ipt_fast.accelerate(model).whole.error < 1e-6
    assert {tensor.dtype for tensor in kept} == {torch.float32}


def test_names_of_rules_are_unique():
    assert len({rule.name for rule in RULES}) == len(RULES)
