"""What is said where a loss, a gradient or a weight is not finite: the first module at fault."""

import pytest
import torch

from ipt_fast.training import loop
from ipt_fast.training.checkpoint import load_checkpoint
from ipt_fast.training.distributed import World
from ipt_fast.training.loading import batches
from ipt_fast.training.parallel import transformer_layers
from ipt_fast.training.run import Run
from tests.training.test_pretraining import FIELDS

NAN = float("nan")


class Inverse(torch.autograd.Function):
    """The same values, with gradients that are not finite."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient / 0


@pytest.fixture
def failing(make_config):
    """What a step says after ``spoil`` has changed the run."""

    def message(spoil, **changes):
        config = make_config(**changes)
        run = Run(config, resume=False)
        batch = next(batches(config, run.objective, 0, run.world))
        spoil(run, batch)
        before = {name: value.clone() for name, value in run.model.state_dict().items()}
        with pytest.raises(FloatingPointError) as raised:
            run.step(batch)
        for name, value in run.model.state_dict().items():
            torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
        assert run.iteration == 0
        assert not any(module._forward_hooks for module in run.model.modules())
        return str(raised.value).partition("iterations, loss ")[2].partition(": ")[2]

    return message


def set_weight(name, value):
    def spoil(run, batch):
        with torch.no_grad():
            dict(run.model.named_parameters())[name][0, 0] = value

    return spoil


def replace_forward(path, change):
    def spoil(run, batch):
        module = run.model.get_submodule(path)
        forward = module.forward
        module.forward = lambda *inputs: change(forward(*inputs))

    return spoil


def test_the_batch(failing):
    def spoil(run, batch):
        batch[0][0, 0, 3, 3] = NAN

    assert failing(spoil) == "the batch is not finite, and so the output of embed (Conv2d) is not"


def test_what_lies_between_modules_is_of_the_one_around_them(failing):
    name = "encoder.0.0.attention.temperature"  # which no module inside the attention has

    def spoil(run, batch):
        with torch.no_grad():
            dict(run.model.named_parameters())[name].fill_(NAN)

    said = failing(spoil)
    assert said.startswith("parameters of encoder.0.0.attention (")
    assert said.endswith(f") are not finite: {name}; its input was finite")


@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_a_weight_that_was_loaded(failing, value):
    name = "encoder.0.1.ffn.expand.second.weight"
    said = failing(set_weight(name, value))
    assert said == f"parameters of encoder.0.1.ffn.expand.second (Conv2d) are not finite: {name}; its input was finite"


def test_an_output_too_large(failing):
    """Finite weights whose product is not: where it happens, not where it is noticed."""
    said = failing(set_weight("embed.weight", 3e38), sigma=(255.0, 255.0))
    assert said == "output of embed (Conv2d) is not finite; its input was finite"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_alone(failing, checkpointing):
    said = failing(
        replace_forward("encoder.0.1.attention", Inverse.apply), accumulate=2, activation_checkpointing=checkpointing
    )
    kind = "FocalContextSelfAttention" if "Focal" in said else "GlobalGridSelfAttention"
    assert said.startswith(f"gradients of encoder.0.1.attention ({kind}) are not finite: encoder.0.1.attention.")
    assert said.endswith("; its output and the gradient of that were finite")


def test_the_loss_itself(failing):
    def spoil(run, batch):
        loss = run.objective.loss_function
        run.objective.loss_function = lambda output, target: loss(output, target) * NAN

    assert failing(spoil) == "the loss is nan, though all that the modules give is finite"

    def spoil_gradient(run, batch):
        loss = run.objective.loss_function
        run.objective.loss_function = lambda output, target: Inverse.apply(loss(output, target))

    assert failing(spoil_gradient).startswith("gradients are not finite from that of the loss on; the first parameter")


def test_a_layer_that_is_at_fault_only_while_it_is_fused(failing, monkeypatch):
    """Module by module all is finite then, so the layer as a whole is named."""

    def spoil(run, batch):
        layer = transformer_layers(run.model)["encoder.0.1"]
        forward, fused = layer.forward, lambda: layer.ffn.expand.first._forward_hooks == {}
        layer.forward = lambda x: forward(x) * (NAN if fused() else 1)

    said = failing(spoil)
    assert said == "output of encoder.0.1 (TransformerLayer) is not finite; its input was finite (as a fused layer)"


def test_what_does_not_happen_again_is_said(failing):
    calls = []

    def once(output):
        calls.append(1)
        return output * NAN if len(calls) == 1 else output

    said = failing(replace_forward("embed", once))
    assert said == "when the step was repeated all values and gradients were finite"


def test_ipt_with_its_tasks(failing):
    name = "body.decoder.layers.0.linear1.weight"
    said = failing(set_weight(name, NAN), **FIELDS)
    assert said == f"parameters of body.decoder.layers.0.linear1 (Linear) are not finite: {name}; its input was finite"


def test_a_loss_without_a_trace_in_gradients(make_config):
    """The derivative of |x| at NaN is 0: the loss tells what gradients do not."""
    run = Run(make_config(loss="l1"), resume=False)
    batch = next(batches(run.config, run.objective, 0, run.world))
    batch[1].fill_(NAN)
    with pytest.raises(FloatingPointError, match="after 0 iterations, loss nan"):
        run.step(batch)


def test_weights_that_are_not_finite_are_not_saved(make_config, monkeypatch):
    """By the update itself, after the last check of gradients."""
    config = make_config()
    step = loop.Run.step

    def overflowing(run, batch):
        step(run, batch)
        if run.iteration == 6:
            set_weight("embed.weight", float("inf"))(run, batch)

    monkeypatch.setattr(loop.Run, "step", overflowing)
    with pytest.raises(FloatingPointError, match="weights are not finite after 6 iterations: embed.weight"):
        loop.train(config)
    assert load_checkpoint(config.out / "checkpoint.pth")["iteration"] == 3


def test_a_normal_step_has_no_hooks(make_config):
    run = Run(make_config(), resume=False)
    seen = []
    run.model.embed.register_forward_hook(lambda module, args, output: seen.append(module._forward_hooks.keys()))
    run.step(next(batches(run.config, run.objective, 0, World())))
    assert len(seen) == 1 and len(seen[0]) == 1
    assert not any(module._forward_hooks for path, module in run.model.named_modules() if path != "embed")
