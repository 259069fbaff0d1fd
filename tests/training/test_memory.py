"""Micro-batches and checkpointed activations: the same gradients from less memory; and training of merged weights."""

import json

import pytest
import torch

from ipt_fast import _extension, use_backend
from ipt_fast.cli import main
from ipt_fast.models import create_model, open_model
from ipt_fast.training.loading import batches
from ipt_fast.training.loop import train
from ipt_fast.training.parallel import checkpoint_activations, transformer_layers
from ipt_fast.training.run import Run
from tests.training.conftest import MICRO
from tests.training.test_loop import assert_equal_states
from tests.training.test_pretraining import FIELDS, TINY

BACKENDS = ["reference", *(["cpu"] if _extension.load() else [])]


def gradients_after_a_step(config):
    run = Run(config, resume=False)
    run.step(next(batches(config, run.objective, 0, run.world)))
    return {name: p.grad for name, p in run.model.named_parameters() if p.grad is not None}, run


@pytest.mark.parametrize("changes", [{}, {**FIELDS, "contrastive": 0.0}], ids=["ipt_v2", "ipt"])
@pytest.mark.parametrize(
    "how",
    [{"accumulate": 4}, {"activation_checkpointing": True}, {"accumulate": 2, "activation_checkpointing": True}],
    ids=["parts", "checkpointing", "both"],
)
def test_gradients_are_those_of_the_joined_batch(make_config, changes, how):
    usual = {**changes, "batch_size": 4, "grad_clip": 0.0}
    expected, whole = gradients_after_a_step(make_config(**usual))
    found, run = gradients_after_a_step(make_config(**usual, **how))
    assert found.keys() == expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6 * largest.item(), msg=name)
    torch.testing.assert_close(run.sums, whole.sums, rtol=1e-5, atol=0)


def saved_bytes(model, x):
    """Bytes of different storages that the graph keeps for the backward pass, but for the model's own."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages, kept = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept.append(tensor)  # so that no address is used twice
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(x)
    output.square().mean().backward()
    return sum(storages.values())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["ipt_v2_tiny", "ipt"])
def test_checkpointed_activations_are_not_kept(name, backend):
    torch.manual_seed(0)
    fields = {**MICRO, "depths": (4, 0, 0, 2)} if name == "ipt_v2_tiny" else {**TINY, "layers": 3, "tasks": ("derain",)}
    model = create_model(name, **fields)
    x = torch.rand(2, 3, 32, 32) if name == "ipt_v2_tiny" else torch.rand(2, 3, 12, 12)
    with use_backend(backend):
        before = saved_bytes(model, x)
        expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        checkpoint_activations(model)
        assert saved_bytes(model, x) < 0.6 * before
    for gradient, one in zip([p.grad for p in model.parameters() if p.grad is not None], expected, strict=True):
        torch.testing.assert_close(gradient, one, rtol=1e-5, atol=1e-6)


def test_layers_are_found_once():
    layers = transformer_layers(create_model("ipt_v2_tiny", **MICRO))
    assert list(layers) == ["encoder.0.0", "encoder.0.1", "decoder.0.0", "decoder.0.1"]
    assert len(transformer_layers(create_model("ipt", **TINY))) == 2
    with pytest.raises(ValueError, match="activation_checkpointing must be False for Conv2d, without transformer"):
        checkpoint_activations(torch.nn.Conv2d(3, 3, 3))


def test_the_average_is_not_checkpointed(make_config):
    """It would run the layers that are trained, as copies of a bound forward do."""
    run = Run(make_config(activation_checkpointing=True), resume=False)
    assert all("forward" in layer.__dict__ for layer in transformer_layers(run.model).values())
    assert not any("forward" in module.__dict__ for module in run.average.modules())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accumulate": 0}, "accumulate must be at least 1; got 0"),
        ({"accumulate": 3}, "batch_size must be a multiple of accumulate 3; got 2"),
        ({"strategy": "tp"}, "strategy must be one of ddp, fsdp; got 'tp'"),
        ({"activation_checkpointing": 1}, "activation_checkpointing must be True or False; got 1"),
        ({"tensorboard": "yes"}, "tensorboard must be True or False; got 'yes'"),
        ({**FIELDS, "accumulate": 2}, "accumulate must be 1 with the contrastive loss, which compares all images"),
    ],
)
def test_bad_settings(make_config, tmp_path, changes, message):
    error = TypeError if "True or False" in message else ValueError
    with pytest.raises(error, match=message):
        train(make_config("a/run", **changes))
    assert not (tmp_path / "a").exists()


def test_how_a_step_is_done_may_change_on_the_way(make_config):
    train(make_config(iterations=2, save_every=1))
    assert train(make_config(iterations=2, accumulate=2, activation_checkpointing=True, strategy="fsdp"), True) == 2


# Merged weights


@pytest.fixture
def cli(images, tmp_path):
    def run(out, *options):
        settings = ["--patch", "16", "--batch-size", "2", "--iterations", "3", "--warmup", "0", "--device", "cpu"]
        call = ["train", "--data", str(images), "--out", str(tmp_path / out), *settings, *options]
        assert main(call) == 0
        return open_model(tmp_path / out)

    return run


def test_training_merged_weights_from_the_start(cli):
    model = cli("merged", "--model-config", json.dumps({**MICRO, "merged": True}), "--lr", "1e-3")
    assert model.config.merged
    assert not [name for name in model.state_dict() if ".k5." in name or ".first." in name]
    start = create_model("ipt_v2_tiny", **MICRO, merged=True)
    assert model.state_dict().keys() == start.state_dict().keys()


def test_training_on_a_model_that_was_merged(cli, images, tmp_path):
    trained = cli("branches", "--model-config", json.dumps(MICRO))
    trained.reparameterize()
    trained.save_pretrained(tmp_path / "reparameterized")
    model = ["--model", str(tmp_path / "reparameterized")]
    same = cli("same", *model, "--lr", "0", "--lr-min", "0")
    assert same.config.merged and same.config == trained.config
    assert_equal_states(dict(same.state_dict()), dict(trained.state_dict()))
    moved = cli("moved", *model, "--lr", "1e-3")
    changed = [name for name, value in moved.state_dict().items() if not torch.equal(value, same.state_dict()[name])]
    assert "encoder.0.0.ffn.depthwise.weight" in changed and "encoder.0.0.ffn.expand.weight" in changed
    assert main(["train", "--out", str(tmp_path / "moved"), "--resume"]) == 0
