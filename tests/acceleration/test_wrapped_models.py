"""Accelerated models that are checkpointed, sharded, frozen or compiled."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import ipt_fast
from ipt_fast.acceleration.accelerated import Accelerated, reason_against
from tests.acceleration.architectures import HAT_S, SPANDREL, build
from tests.acceleration.small import blocks
from tests.modules.changed import assert_close


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
        reasons = [reason_against(part) for part in module.modules() if isinstance(part, Accelerated)]
        assert len(reasons) >= 3 and set(reasons) == {None}


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
