"""Tools that change models from outside: offloading, sharding, quantisation, adapters."""

import pytest
import torch
from torch import nn

import ipt_fast
import ipt_fast.inference
from ipt_fast import _extension
from tests.modules.changed import PARTS, assert_close, build
from tests.oracles.public import public_module


def test_offloaded_parts():
    """Parameters on the meta device that hooks bring in for the time of a call, as accelerate's cpu_offload does."""
    for name in ("ipt_v2", "ipt_v2 merged", "ipt"):
        model, x = build(name)
        with torch.no_grad():
            expected = model(x)
        for module in model.modules():
            own = dict(module.named_parameters(recurse=False))
            if not own:
                continue

            def bring(module, inputs, own=own):
                for key, value in own.items():
                    module._parameters[key] = value

            def send(module, inputs, output, own=own):
                for key, value in own.items():
                    module._parameters[key] = nn.Parameter(value.to("meta"))

            module.register_forward_pre_hook(bring)
            module.register_forward_hook(send)
            send(module, None, None)
        with torch.no_grad():
            assert_close(model(x), expected)
        assert all(parameter.is_meta for parameter in model.parameters())


def test_sharded_parts(tmp_path):
    """fully_shard of single attentions and networks, on one process."""
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        for name in ("ipt_v2", "ipt"):
            model, x = build(name)
            expected = model(x)
            wanted = torch.autograd.grad(expected.square().sum(), [p for p in model.parameters() if p.requires_grad])
            paths = PARTS[name][:2] if name == "ipt" else ("encoder.0.0.attention", "encoder.0.1.ffn")
            for path in paths:
                fully_shard(model.get_submodule(path), mesh=mesh)
            out = model(x)
            assert_close(out.detach(), expected.detach())
            out.square().sum().backward()
            for parameter, grad in zip((p for p in model.parameters() if p.requires_grad), wanted, strict=True):
                got = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
                assert (got - grad).abs().max() <= 1e-4 * grad.abs().max() + 1e-6
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_into_a_sharded_model_changes_nothing(tmp_path):
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, _ = build("ipt_v2")
        torch.save({name: value + 1 for name, value in model.state_dict().items()}, tmp_path / "other.pth")
        fully_shard(model.encoder[0][1].attention, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        before = {name: value.clone() for name, value in model.named_parameters()}
        with pytest.raises(ValueError, match=r"encoder\.0\.1\.attention.*, a DTensor"):
            ipt_fast.load_checkpoint(model, tmp_path / "other.pth")
        assert all((value == before[name]).all() for name, value in model.named_parameters())
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_restoring_with_changed_models():
    image = torch.rand(1, 3, 12, 12)
    model, _ = build("ipt")
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert ipt_fast.restore(image, quantised).isfinite().all()
    model.to("meta")
    with pytest.raises(ValueError, match="model must have its weights in memory; got the meta device"):
        ipt_fast.restore(image, model)
    model, _ = build("ipt_v2")
    assert ipt_fast.inference.Restorer(model)._layers_are_fused() == _extension.load()
    assert not ipt_fast.inference.Restorer(model.to_reference())._layers_are_fused()
    model.encoder[0][0].attention.register_forward_hook(lambda *_: None)
    assert not ipt_fast.inference.Restorer(model)._layers_are_fused()


def test_dynamically_quantised_linear_layers():
    model, x = build("ipt")
    with torch.no_grad():
        expected = model(x)
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
        out = quantised(x)
    assert 0 < (out - expected).abs().max() < 0.2 * expected.abs().max()
    assert "linear1: it is a" in str(ipt_fast.explain(quantised))


def test_quantised_weights_of_torchao():
    torchao = pytest.importorskip("torchao.quantization")
    model, x = build("ipt")
    with torch.no_grad():
        expected = model(x)
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
        out = model(x)
    assert 0 < (out - expected).abs().max() < 0.2 * expected.abs().max()


def test_adapters_of_peft():
    peft = public_module("peft")
    for name, targets in {"ipt_v2": ["qkv", "attention.project"], "ipt": ["linear1", "linear2", "out_proj"]}.items():
        model, x = build(name)
        with torch.no_grad():
            before = model(x)
        config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
        adapted = peft.get_peft_model(model, config)
        out = adapted(x)
        assert (out - before).abs().max() > 1e-6
        out.square().sum().backward()
        trained = {key: value for key, value in adapted.named_parameters() if value.requires_grad}
        assert trained and all(value.grad is not None and value.grad.abs().max() > 0 for value in trained.values())


def test_offload_of_accelerate():
    accelerate = pytest.importorskip("accelerate")
    for name in ("ipt_v2", "ipt"):
        model, x = build(name)
        with torch.no_grad():
            expected = model(x)
            accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
            assert_close(model(x), expected)
