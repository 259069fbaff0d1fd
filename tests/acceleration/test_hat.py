"""Blocks of HAT, accelerated: their convolutional branch, and the bias of windows that overlap."""

import copy

import pytest
import torch
from torch import nn

import ipt_fast
from ipt_fast import _extension
from ipt_fast.acceleration.accelerated import Accelerated, reason_against
from ipt_fast.acceleration.rules import hat
from ipt_fast.acceleration.rules.swin import dense_bias
from ipt_fast.modules.convolution import EMULATED
from ipt_fast.reference.window_attention import relative_position_index
from tests.acceleration.architectures import MODELS
from tests.modules.changed import assert_close

SIZE = 33, 38


@pytest.fixture
def models():
    """(a plain HAT, the same accelerated)."""
    torch.manual_seed(0)
    plain = MODELS["HAT"][0]()
    accelerated = copy.deepcopy(plain)
    ipt_fast.accelerate(accelerated, verify=False)
    return plain, accelerated


def named(model, name):
    return [part for part in model.modules() if type(part).__name__ == name]


def called(monkeypatch, model, x):
    """The modules that a forward calls, and what it returns."""
    found, of_part = [], nn.Module.__call__

    def counted(module, *args, **kwargs):
        found.append(type(module).__name__)
        return of_part(module, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "__call__", counted)
    with torch.no_grad():
        return found, model(x)


@pytest.mark.parametrize("frozen", [False, True])
def test_the_convolutional_branch_is_not_called(models, monkeypatch, frozen):
    plain, accelerated = models
    x = torch.rand(1, 3, *SIZE)
    with torch.no_grad():
        expected = plain(x)
    names, out = called(monkeypatch, ipt_fast.freeze(accelerated) if frozen else accelerated, x)
    assert "HAB" in names and not {"CAB", "ChannelAttention", "GELU"} & set(names)
    assert_close(out, expected)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("part", ["cab.0", "cab.2", "cab.3.attention.1"])
def test_a_branch_with_a_changed_convolution_is_called(models, frozen, part):
    for model in models:
        for block in named(model, "HAB"):
            block.conv_block.get_submodule(part).register_forward_hook(lambda module, args, output: 3 * output)
    plain, accelerated = models
    x = torch.rand(1, 3, *SIZE)
    with torch.no_grad():
        assert_close((ipt_fast.freeze(accelerated) if frozen else accelerated)(x), plain(x))
    assert all(isinstance(block, Accelerated) and reason_against(block) is None for block in named(accelerated, "HAB"))


def test_another_branch_is_called(models):
    for model in models:
        for block in named(model, "HAB"):
            block.conv_block.cab[1] = nn.GELU(approximate="tanh")
    plain, accelerated = models
    x = torch.rand(1, 3, *SIZE)
    with torch.no_grad():
        assert_close(accelerated(x), plain(x))


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


def wrapped_attention(branch):
    branch.cab[3].attention = Wrapper(branch.cab[3].attention)


BRANCHES = {
    "wrapped": lambda branch: setattr(branch, "cab", Wrapper(branch.cab)),
    "compiled": lambda branch: setattr(branch, "cab", torch.compile(branch.cab, backend="eager")),
    "pruned": lambda branch: setattr(branch, "cab", nn.Sequential()),
    "attention wrapped": wrapped_attention,
}


@pytest.mark.parametrize("accelerated_first", [True, False])
@pytest.mark.parametrize("change", BRANCHES)
def test_a_branch_of_other_parts_is_called(change, accelerated_first):
    torch.manual_seed(0)
    plain = MODELS["HAT"][0]()
    accelerated = copy.deepcopy(plain)
    if accelerated_first:
        ipt_fast.accelerate(accelerated, verify=False)
    for model in (plain, accelerated):
        for block in named(model, "HAB"):
            BRANCHES[change](block.conv_block)
    report = None if accelerated_first else ipt_fast.accelerate(accelerated, verify=False)
    x = torch.rand(1, 3, *SIZE)
    with torch.no_grad():
        assert_close(accelerated(x), plain(x))
    assert report is None or {"HAT hybrid block"} <= {module.rule.name for module in named(accelerated, "HAB")}


def test_a_batch_of_branches(models):
    """As torch.func.vmap makes it: parameters of some parts have one axis more, and nothing is written in place."""
    plain, accelerated = (named(model, "HAB")[0].eval() for model in models)
    tokens, index = torch.randn(1, 16 * 16, 96), models[0].relative_position_index_SA
    parameters = {
        name: torch.stack([value, 1.1 * value]).detach()
        for name, value in plain.named_parameters()
        if "conv_block" in name
    }

    def outputs(block):
        def of(values):
            return torch.func.functional_call(block, values, (tokens, (16, 16), index, None))

        return torch.func.vmap(of)(parameters)

    assert_close(outputs(accelerated), outputs(plain))


def test_a_frozen_model_does_not_grow_where_every_call_has_an_index_of_its_own(models):
    plain, accelerated = models
    block = named(ipt_fast.freeze(accelerated)._ensure_packed(), "OCAB")[0]
    tokens, index = torch.randn(1, 16 * 16, 96), plain.relative_position_index_OCA
    with torch.no_grad():
        expected = named(plain, "OCAB")[0](tokens, (16, 16), index)
        for _ in range(150):
            out = block(tokens, (16, 16), index.clone())
    assert_close(out, expected)
    assert len(block.__dict__["remembered"]) < 100


def test_a_bias_by_offsets_stays_a_table(models):
    _, accelerated = models
    (block,), index = named(accelerated, "OCAB"), accelerated.relative_position_index_OCA
    window, keys = (block.window_size,) * 2, (block.overlap_win_size,) * 2
    dense = dense_bias(block.relative_position_bias_table, index)
    with torch.no_grad():
        table = hat._bias(block, index)
        assert table.dim() == 2
        assert torch.equal(dense_bias(table, relative_position_index(window, keys)), dense)
        other = index.clone()
        other[0, 0], other[3, 5] = index[3, 5], index[0, 0]
        assert torch.equal(hat._bias(block, other), dense_bias(block.relative_position_bias_table, other))
    assert torch.equal(hat._bias(block, index), dense)  # the gradient's way


@pytest.mark.skipif(not _extension.load(), reason=str(_extension.error()))
@pytest.mark.skipif(torch.bfloat16 in EMULATED, reason="PyTorch emulates bfloat16, so that nothing is packed")
def test_a_frozen_model_has_the_weights_of_its_convolutions_in_16_bits(models):
    _, accelerated = models
    frozen, x = ipt_fast.freeze(accelerated, torch.bfloat16), torch.rand(1, 3, *SIZE)
    branch = named(accelerated, "CAB")[0].cab
    of_branch = {tuple(branch[0].weight.shape), tuple(branch[2].weight.shape)}
    frozen(x)
    assert of_branch <= cast(lambda: by_autocast(accelerated, x)) and not of_branch & cast(lambda: frozen(x))


def by_autocast(model, x):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return model(x)


def cast(call):
    """The shapes of what a call casts to another dtype."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        call()
    return {tuple(event.input_shapes[0]) for event in profile.events() if event.name == "aten::_to_copy"}
