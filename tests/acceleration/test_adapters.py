"""LoRA before and after accelerate(): trained, merged and taken back; by peft, where it is installed, and by hand."""

import copy

import pytest
import torch
from torch import nn

import ipt_fast
from ipt_fast.acceleration.accelerated import Accelerated, reason_against
from tests.acceleration import small, test_dat
from tests.modules.changed import Adapter, assert_close, replace
from tests.oracles.public import public_module

MODELS = {"SwinIR": small.swinir, "DAT": lambda: test_dat.model(depth=[2], **test_dat.LIGHT)}
TARGETS = {"attention": ("qkv", "proj"), "feed-forward": ("fc1", "fc2"), "both": ("qkv", "proj", "fc1", "fc2")}


class ByHand:
    """What a library of adapters does, by this suite's own adapter."""

    def __init__(self, model, targets):
        self.model, self.adapters = model, {}
        model.requires_grad_(False)
        for path, module in list(model.named_modules()):
            if path.rpartition(".")[2] in targets and isinstance(module, nn.Linear):
                self.adapters[path] = Adapter(module)
                replace(model, path, self.adapters[path])

    def __call__(self, x):
        return self.model(x)

    def merged(self):
        with torch.no_grad():
            for path, adapter in self.adapters.items():
                adapter.base.weight += adapter.up.weight @ adapter.down.weight
                replace(self.model, path, adapter.base)
        return self.model


class ByPeft:
    def __init__(self, model, targets):
        peft = public_module("peft")
        config = peft.LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False)
        self.model = peft.get_peft_model(model, config)

    def __call__(self, x):
        return self.model(x)

    def merged(self):
        return self.model.merge_and_unload()


def adapted(kind, model, targets):
    torch.manual_seed(1)
    return kind(model, targets)


def step(adapters, optimizer, x):
    torch.manual_seed(2)  # of stochastic depth
    optimizer.zero_grad()
    adapters(x).square().mean().backward()
    optimizer.step()


def reasons(model):
    return {reason_against(module) for module in model.modules() if isinstance(module, Accelerated)}


@pytest.mark.parametrize("order", ["accelerated first", "adapted first"])
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", [ByHand, ByPeft])
def test_low_rank_adapters(kind, name, targets, order):
    plain, x = MODELS[name]().eval(), torch.rand(2, 3, 16, 24)
    accelerated = copy.deepcopy(plain)
    if order == "accelerated first":
        report = ipt_fast.accelerate(accelerated, example=x)
        assert report.accelerated
    with torch.no_grad():
        before = plain(x)
    pair = [adapted(kind, model, TARGETS[targets]) for model in (plain, accelerated)]
    if order == "adapted first":
        report = ipt_fast.accelerate(accelerated, example=x)
    outs = [each(x) for each in pair]
    assert_close(outs[1], outs[0])
    assert (outs[1] - before).abs().max() > 1e-3 * before.abs().max()
    trained = [[p for p in each.model.parameters() if p.requires_grad] for each in pair]
    grads = [torch.autograd.grad(out.square().sum(), own) for out, own in zip(outs, trained, strict=True)]
    for expected, found in zip(*grads, strict=True):
        assert expected.abs().max() > 0 and (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    for each, own in zip(pair, trained, strict=True):
        each.model.train()
        optimizer = torch.optim.SGD(own, lr=1e-2)
        for _ in range(2):
            step(each, optimizer, x)
        each.model.eval()
    with torch.no_grad():
        expected, found = (each(x) for each in pair)
    assert_close(found, expected)
    plain, accelerated = (each.merged() for each in pair)
    assert reasons(accelerated) <= {None}
    with torch.no_grad():
        assert_close(accelerated(x), expected)
        report.undo()
        assert not reasons(accelerated)
        assert_close(accelerated(x), plain(x))
