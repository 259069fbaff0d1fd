"""Frozen accelerated models: the accelerated model's numbers, bit for bit, with what weights give computed once."""

import copy
import functools
import pickle
import re
import threading

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import ipt_fast
from ipt_fast import _extension
from ipt_fast.acceleration.accelerated import Accelerated, Settled
from ipt_fast.acceleration.rules import _weights, dat
from tests.acceleration.architectures import EXTRA, MODELS, SPANDREL, build
from tests.acceleration.comparison import randomised
from tests.acceleration.small import BLOCK, swinir
from tests.modules.changed import assert_close
from tests.oracles.public import public_module

DAT = dict(
    upscale=2, upsampler="pixelshuffledirect", embed_dim=60, num_heads=[6], split_size=[8, 32], expansion_factor=2.0,
    resi_connection="3conv",
)  # fmt: skip
OMNISR = dict(num_feat=64, res_num=1, block_num=1, up_scale=2, window_size=8, pe=True, bias=True)
FDAT = dict(scale=2, num_groups=1, depth_per_group=1, upsampler_type="pixelshuffledirect")
RESTORMER = dict(dim=48, num_blocks=[1, 1, 1, 1], num_refinement_blocks=1, heads=[1, 2, 4, 8])


def _build(module, cls, **options):
    return randomised(getattr(public_module(module), cls)(**options))


FAMILIES = {name: (make, size) for name, (make, _, size) in MODELS.items()} | {
    "DAT": (functools.partial(build, SPANDREL, "DAT", depth=[3], **DAT), (11, 27)),
    "OmniSR": (functools.partial(build, SPANDREL, "OmniSR", **OMNISR), (17, 21)),
    "FDAT": (functools.partial(_build, f"{SPANDREL}.FDAT.__arch.fdat", "FDAT", **FDAT), (9, 13)),
    "Restormer": (
        functools.partial(_build, f"{EXTRA}.Restormer.__arch.restormer_arch", "Restormer", **RESTORMER), (24, 40),
    ),
}  # fmt: skip
needs_kernels = pytest.mark.skipif(not _extension.load(), reason=str(_extension.error()))


def accelerated(make):
    torch.manual_seed(0)
    model = make()
    ipt_fast.accelerate(model, verify=False)
    return model


def run(model, x, dtype=torch.float32):
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        return model(x)


def small_dat():
    return accelerated(FAMILIES["DAT"][0])


def settled(frozen):
    return [part for part in frozen._packed[1].modules() if isinstance(part, Settled)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FAMILIES)
def test_same_numbers_as_the_accelerated_model(name, dtype):
    make, size = FAMILIES[name]
    model = accelerated(make)
    frozen, channels = ipt_fast.freeze(model, dtype), 1 if name.endswith("JPEG") else 3
    if _extension.load():
        blocks = [part for part in model.modules() if isinstance(part, Accelerated)]
        assert len(settled(frozen)) == len(blocks) > 0
    larger = tuple(48 + length for length in size)
    for shape in ((2, channels, *size), (1, channels, *larger), (2, channels, *size)):
        if "image of one window" in name and shape[2:] != size:
            continue
        x = torch.rand(shape)
        try:
            expected = run(model, x, dtype)
        except RuntimeError as error:  # a plain part of somebody's model that mixes dtypes
            assert dtype != torch.float32
            with pytest.raises(RuntimeError, match=re.escape(str(error))):
                frozen(x)
            return
        assert torch.equal(frozen(x), expected)
        with torch.inference_mode():
            assert torch.equal(frozen(x), expected)


@needs_kernels
def test_what_weights_give_is_computed_once(monkeypatch):
    frozen, x, calls = ipt_fast.freeze(small_dat()), torch.rand(1, 3, 16, 16), []
    of_part = torch.nn.Module.__call__

    def counted(module, *args, **kwargs):
        calls.append(type(module).__name__)
        return of_part(module, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "__call__", counted)
    frozen(x)
    first = calls.count("DynamicPosBias")
    frozen(torch.rand(1, 3, 24, 16))
    assert first == 4 == calls.count("DynamicPosBias")


@needs_kernels
def test_nothing_is_remembered_of_a_model_that_may_change():
    model, x = small_dat(), torch.rand(1, 3, 16, 16)
    before = run(model, x)
    frozen = ipt_fast.freeze(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    assert torch.equal(frozen(x), before) and not torch.equal(run(model, x), before)
    assert not any("remembered" in part.__dict__ for part in model.modules())
    assert not any("remembered" in part.__dict__ for part in frozen._plain.modules())


def test_undoing_the_acceleration_leaves_the_frozen_model():
    model, x = swinir(), torch.rand(1, 3, 8, 16)
    report = ipt_fast.accelerate(model, verify=False)
    frozen = ipt_fast.freeze(model)
    expected = frozen(x)
    report.undo()
    model.get_submodule(BLOCK).register_forward_hook(lambda module, args, output: 2 * output)
    assert torch.equal(frozen(x), expected)


@pytest.mark.parametrize("part", ["", ".norm1", ".attn", ".attn.qkv", ".mlp.fc1"])
def test_hooks_at_freezing_keep_their_effect(part):
    model, x, seen = accelerated(swinir), torch.rand(1, 3, 8, 16), []
    without = run(model, x)

    def hook(module, args, output):
        seen.append(type(module).__name__)
        return 1.5 * output

    model.get_submodule(BLOCK + part).register_forward_hook(hook)
    frozen = ipt_fast.freeze(model)
    expected = run(model, x)
    assert torch.equal(frozen(x), expected) and len(seen) == 2 and not torch.equal(expected, without)
    if _extension.load():
        assert any(isinstance(block, Settled) for block in frozen._packed[1].modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_and_files(dtype):
    model, x = small_dat(), torch.rand(1, 3, 11, 27)
    frozen = ipt_fast.freeze(model, dtype)
    expected = frozen(x)
    for again in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen)), ipt_fast.freeze(frozen)):
        assert torch.equal(again(x), expected) and again.dtype == dtype


@needs_kernels
def test_threads():
    frozen, wrong = ipt_fast.freeze(small_dat()), []
    images = [torch.rand(1, 3, 8 + 8 * i, 24) for i in range(4)]
    expected = [frozen(x) for x in images]
    frozen = copy.deepcopy(frozen)  # remembers nothing yet

    def repeat(x, y):
        wrong.extend(len(x) for _ in range(5) if not torch.equal(frozen(x), y))

    threads = [threading.Thread(target=repeat, args=pair) for pair in zip(images, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@needs_kernels
def test_other_instructions(monkeypatch):
    model, x = small_dat(), torch.rand(1, 3, 16, 16)
    frozen = ipt_fast.freeze(model)
    for level in (*torch.ops.ipt_fast_cpu.isa_levels(), torch.ops.ipt_fast_cpu.isa_levels()[0]):
        monkeypatch.setenv("IPT_FAST_CPU_ISA", level)
        assert torch.equal(frozen(x), run(model, x))


def test_backends_and_counters():
    model, x = small_dat(), torch.rand(1, 3, 16, 16)
    frozen = ipt_fast.freeze(model)
    counts = []
    for each in (model, frozen):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            each(x)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
    expected = run(model, x)
    assert torch.equal(frozen(x), expected)
    with ipt_fast.use_backend("reference"):
        assert torch.equal(frozen(x), run(model, x))
    assert torch.equal(frozen(x), expected)


@pytest.mark.filterwarnings("ignore")
def test_compile_and_export():
    torch._dynamo.reset()
    frozen, x = ipt_fast.freeze(accelerated(swinir)), torch.rand(1, 3, 8, 16)
    expected = frozen(x)
    compiled = torch.compile(frozen, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), expected)  # compilers may lay maps out differently
    with torch.no_grad():
        assert torch.equal(torch.export.export(frozen, (x,)).module()(x), expected)
    torch._dynamo.reset()


class Doubled(nn.Linear):
    """A linear layer whose weight is remembered twice as large."""

    def forward(self, x):
        return nn.functional.linear(x, doubled(self))


@_weights.of_weights
def doubled(layer):
    return 2 * layer.weight


def test_values_depend_on_autocast_and_are_of_use_in_and_out_of_inference_mode():
    layer, x = Doubled(4, 4), torch.rand(2, 4)
    free = copy.deepcopy(layer)
    _weights.remembering(layer)
    with torch.inference_mode():
        layer(x)
    assert layer(x).requires_grad  # where gradients are recorded, it is not remembered
    with torch.no_grad():
        first = doubled(layer)
        assert first is doubled(layer) and not first.is_inference() and not first.requires_grad
        with torch.autocast("cpu", torch.bfloat16):
            assert doubled(layer) is not first
        with FlopCounterMode(display=False):
            assert doubled(layer) is not first
        assert doubled(free) is not doubled(free)


def test_folded_norms_are_computed_anew_in_a_free_model():
    model, x = small_dat(), torch.rand(1, 3, 16, 16)
    before = run(model, x)
    block = next(part for part in model.modules() if isinstance(part, Accelerated) and part.rule in dat.RULES)
    block.attn.dwconv[1].running_var.mul_(4)
    assert not torch.equal(run(model, x), before)
