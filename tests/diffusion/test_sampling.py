"""Sampling against formulas written anew in float64 and, where diffusers has the same, its schedulers."""

import math
import time
import types

import numpy as np
import pytest
import torch
from torch import nn

from ipt_fast import create_model, freeze
from ipt_fast.diffusion import GaussianDiffusion, Schedule, sample


class Toy(nn.Module):
    """A prediction that depends on every argument, and on one image at a time; it counts its calls."""

    def __init__(self, channels=3, learn_variance=True, num_classes=10, label_dropout=0.1):
        super().__init__()
        self.config = types.SimpleNamespace(
            in_channels=channels, sample_size=4, num_classes=num_classes, label_dropout=label_dropout
        )
        self.learn_variance, self.batches, self.timesteps = learn_variance, [], []
        self.scale = nn.Parameter(torch.tensor(0.9))
        self.eval()

    def forward(self, x, timestep, class_labels=None):
        self.batches.append(len(x))
        self.timesteps.append(timestep.tolist())
        shift = 0.1 * torch.sin(0.01 * timestep.to(x.dtype))
        if class_labels is not None:
            shift = shift + 0.03 * class_labels
        noise = self.scale.to(x.dtype) * x + shift.view(-1, 1, 1, 1)
        return torch.cat([noise, torch.tanh(x * 2)], 1) if self.learn_variance else noise


def noises(seed, shape, count):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, *shape, generator=generator).double() for _ in range(count)]


def naive_sample(model, label, seed, steps, *, sampler="ddpm", guidance=1.0, eta=0.0, clip=False, variance="small"):
    """One image, by the papers' formulas, in float64."""
    kept_of_all, kept = [], 1.0
    for number in range(1000):
        kept *= 1 - (1e-4 + (0.02 - 1e-4) * number / 999)
        kept_of_all.append(kept)
    times = [round(number * 999 / (steps - 1)) for number in range(steps)]
    shape = (model.config.in_channels, 4, 4)
    draws = iter(noises(seed, shape, steps + 1))
    x = next(draws)
    for i in reversed(range(steps)):
        kept, before = kept_of_all[times[i]], kept_of_all[times[i - 1]] if i else 1.0
        beta = 1 - kept / before
        time = torch.tensor([times[i]])

        def predict(number, x=x, time=time):
            return model(x, time, None if number is None else torch.tensor([number])).double()

        output = predict(label)
        predicted, v = output[:, : shape[0]], output[:, shape[0] :]
        if guidance != 1:
            unguided = predict(model.config.num_classes)[:, : shape[0]]
            predicted = unguided + guidance * (predicted - unguided)
        x_0 = (x - math.sqrt(1 - kept) * predicted) / math.sqrt(kept)
        if clip:
            x_0 = x_0.clamp(-1, 1)
        if sampler == "ddim":
            predicted = (x - math.sqrt(kept) * x_0) / math.sqrt(1 - kept)
            sigma = eta * math.sqrt((1 - before) / (1 - kept)) * math.sqrt(1 - kept / before)
            x = math.sqrt(before) * x_0 + math.sqrt(1 - before - sigma**2) * predicted
            if sigma:
                x = x + sigma * next(draws)
            continue
        mean = math.sqrt(before) * beta / (1 - kept) * x_0 + math.sqrt(1 - beta) * (1 - before) / (1 - kept) * x
        if i == 0:
            return mean
        small = beta * (1 - before) / (1 - kept)
        if model.learn_variance:
            log = (v + 1) / 2 * math.log(beta) + (1 - v) / 2 * math.log(small)
        else:
            log = torch.tensor(math.log(small if variance == "small" else beta))
        x = mean + (log / 2).exp() * next(draws)
    return x


def close(actual, expected):
    torch.testing.assert_close(actual.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("guidance", [1.0, 4.0, 0.0])
@pytest.mark.parametrize("learn_variance", [True, False])
@pytest.mark.parametrize("clip", [True, False])
def test_ddpm(guidance, learn_variance, clip):
    model = Toy(learn_variance=learn_variance)
    images = sample(model, [3, 7], seeds=[11, 5], steps=20, guidance=guidance, clip=clip)
    assert images.shape == (2, 3, 4, 4) and images.dtype == torch.float32
    for image, label, seed in zip(images, (3, 7), (11, 5), strict=True):
        close(image[None], naive_sample(model, label, seed, 20, guidance=guidance, clip=clip))


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("clip", [True, False])
def test_ddim(eta, clip):
    model = Toy()
    images = sample(model, [3], seeds=[11], steps=20, sampler="ddim", eta=eta, guidance=1.5, clip=clip)
    close(images, naive_sample(model, 3, 11, 20, sampler="ddim", guidance=1.5, eta=eta, clip=clip))


def test_fixed_large():
    model = Toy(learn_variance=False)
    images = sample(model, [3], seeds=[11], steps=20, variance="fixed_large")
    close(images, naive_sample(model, 3, 11, 20, variance="large"))
    assert (images - sample(model, [3], seeds=[11], steps=20)).abs().max() > 0.01


def test_a_model_without_classes():
    model = Toy(num_classes=0, channels=1)
    images = sample(model, seeds=[1], steps=10)
    close(images, naive_sample(model, None, 1, 10))


def test_all_thousand_steps():
    model = Toy(channels=1)
    close(sample(model, [0], seeds=[2], steps=1000), naive_sample(model, 0, 2, 1000))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_an_image_does_not_depend_on_its_batch(sampler, guidance):
    settings = {"sampler": sampler, "guidance": guidance, "steps": 10, "eta": 0.3}
    together = sample(Toy(), [1, 2, 3], seeds=[7, 8, 9], **settings)
    alone = sample(Toy(), [2], seeds=[8], **settings)
    assert torch.equal(together[1], alone[0])
    again = sample(Toy(), [1, 2, 3], seeds=[7, 8, 9], **settings)
    assert torch.equal(again, together)
    others = sample(Toy(), [2], seeds=[9], **settings)
    assert not torch.equal(others, alone)


@pytest.mark.parametrize(("guidance", "batch"), [(1.0, 2), (1.5, 4)])
def test_one_call_a_step_of_the_models_own_timesteps(guidance, batch):
    model, seen = Toy(), []
    sample(
        model, [1, 2], seeds=[0, 1], steps=5, guidance=guidance, progress=lambda done, steps: seen.append((done, steps))
    )
    assert model.batches == [batch] * 5
    assert model.timesteps == [[time] * batch for time in (999, 749, 500, 250, 0)]
    assert seen == [(done, 5) for done in range(1, 6)]


def test_the_global_generator_and_the_model_are_left_alone():
    before = torch.get_rng_state()
    model = Toy()
    sample(model, [1], seeds=[0], steps=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training and model.scale.grad is None


def test_a_model_in_half_precision():
    model = Toy().bfloat16()
    images = sample(model, [1], seeds=[0], steps=5)
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, sample(Toy(), [1], seeds=[0], steps=5), rtol=0.1, atol=0.2)


def test_another_schedule_and_shape():
    schedule = Schedule.linear(100, 1e-3, 0.2)
    model = Toy()
    images = sample(model, [1], seeds=[0], steps=10, shape=(3, 4, 5), schedule=schedule)
    assert images.shape == (1, 3, 4, 5)
    assert model.timesteps[0] == [99]


@pytest.mark.parametrize("name", ["dit_s_2", "latent_ipt_v2_s"])
def test_models_of_the_library_and_their_frozen_form(name):
    small = (
        {"width": 8, "heads": (1, 1, 1), "depths": (1, 1, 1)}
        if "ipt" in name
        else {"width": 8, "layers": 1, "heads": 1}
    )
    torch.manual_seed(0)
    model = create_model(name, in_channels=2, sample_size=8, num_classes=3, **small).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    settings = {"seeds": [1, 2], "steps": 4, "guidance": 2.0}
    images = sample(model, [0, 3], **settings)
    assert images.shape == (2, 2, 8, 8) and images.isfinite().all()
    torch.testing.assert_close(sample(freeze(model), [0, 3], **settings), images, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="labels must be from 0 to 3; got 4"):
        sample(freeze(model), [0, 4], **settings)


@pytest.mark.slow
def test_time_beyond_the_models_own():
    """Less than 3 %, with room to spare; of DDPM, which does more than DDIM."""
    model, inside = create_model("dit_s_2").eval(), []

    def timed(module, x, *arguments, forward=model.forward):
        start = time.perf_counter()
        output = forward(x, *arguments)
        inside.append(time.perf_counter() - start)
        return output

    model.forward = types.MethodType(timed, model)
    start = time.perf_counter()
    sample(model, [1] * 8, seeds=range(8), steps=4)
    assert time.perf_counter() - start < 1.03 * sum(inside)


# -- diffusers ------------------------------------------------------------------------------------------------------


def run_of_diffusers(scheduler, model, steps, learned, **settings):
    """The images of a scheduler of diffusers, with the noise that ours draws."""
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(1, 3, 4, 4, generator=generator)
    for timestep in scheduler.timesteps:
        output = model(x, timestep[None], torch.tensor([2]))
        if not learned:
            output = output[:, :3]
        x = scheduler.step(output, timestep, x, generator=generator, **settings).prev_sample
    return x


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("variance", ["learned_range", "fixed_small", "fixed_large"])
def test_ddpm_is_that_of_diffusers(variance, clip):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(variance_type=variance, clip_sample=clip, timestep_spacing="linspace")
    learned = variance == "learned_range"
    model = Toy(learn_variance=learned)
    images = sample(model, [2], seeds=[4], steps=25, clip=clip, variance="fixed_small" if learned else variance)
    expected = run_of_diffusers(scheduler, model, 25, learned)
    torch.testing.assert_close(images, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim_is_that_of_diffusers(eta, clip):
    # Its steps are spaced in another way, so all of them are taken.
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(clip_sample=clip)
    model = Toy(learn_variance=False)
    images = sample(model, [2], seeds=[4], steps=1000, sampler="ddim", eta=eta, clip=clip)
    expected = run_of_diffusers(scheduler, model, 1000, False, eta=eta, use_clipped_model_output=True)
    torch.testing.assert_close(images, expected, rtol=1e-3, atol=1e-3)


def test_the_schedule_is_that_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(timestep_spacing="linspace")
    scheduler.set_timesteps(250)
    assert scheduler.timesteps.flip(0).tolist() == Schedule.linear().respaced(250).timesteps.tolist()
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), Schedule.linear().alphas_cumprod, rtol=1e-4, atol=0)
    x, noise, step = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.tensor([3, 800])
    torch.testing.assert_close(GaussianDiffusion().q_sample(x, step, noise), scheduler.add_noise(x, noise, step))


# -- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sampler": "euler"}, "sampler must be one of ddpm, ddim; got 'euler'"),
        ({"variance": "learned"}, "variance must be one of fixed_small, fixed_large; got 'learned'"),
        ({"steps": 1}, "steps must be from 2 to the 1000"),
        ({"guidance": math.nan}, "guidance must be finite; got nan"),
        ({"guidance": "2"}, "guidance must be a number; got '2'"),
        ({"eta": 1.5}, r"eta must be in \[0, 1\]; got 1.5"),
        ({"seeds": []}, "seeds must be one for each image; got none"),
        ({"seeds": [1.5]}, "seeds must be integers; got 1.5"),
        ({"seeds": [-1]}, r"seeds must be in \[0, 2\*\*63\); got -1"),
        ({"shape": (4, 4)}, r"shape must be three positive integers, channels, height and width; got \(4, 4\)"),
        ({"seeds": 3}, "seeds must be a sequence of integers, one for each image; got 3"),
        ({"seeds": [True]}, "seeds must be integers; got True"),
        ({"seeds": torch.tensor([True])}, "seeds must be integers; got tensor"),
        ({"seeds": [2**63]}, r"seeds must be in \[0, 2\*\*63\); got 9223372036854775808"),
        ({"shape": 4}, "shape must be three positive integers, channels, height and width; got 4"),
        ({"shape": (3, 0, 4)}, "shape must be three positive integers, channels, height and width; got"),
        ({"shape": (2, 4, 4)}, r"shape must have 3 channels, as the model takes; got \(2, 4, 4\)"),
        ({"schedule": 1000}, "schedule must be a Schedule; got int"),
        ({"labels": ["a"]}, r"labels must be integers; got \['a'\]"),
        ({"labels": [2**70]}, r"labels must be integers; got \[1180591620717411303424\]"),
        ({"labels": []}, r"labels must be one for each of 1 seeds; got shape \(0,\)"),
        ({"labels": 1}, r"labels must be one for each of 1 seeds; got shape \(\)"),
        ({"labels": [11]}, "labels must be from 0 to 10; got 11"),
        ({"labels": [-1]}, "labels must be from 0 to 10; got -1"),
        ({"labels": [1, 2]}, r"labels must be one for each of 1 seeds; got shape \(2,\)"),
        ({"labels": [0.5]}, "labels must be integers; got torch.float32"),
        ({"labels": None}, "labels must be given for a model of 10 classes; got None"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        sample(Toy(), **{"labels": [1], "seeds": [0], "steps": 3, **arguments})


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (Toy().train(), {}, "model must be in eval mode"),
        (Toy().forward, {}, "model must be a torch.nn.Module; got method"),
        (Toy(num_classes=0), {}, "labels must be None for a model without classes; got some"),
        (Toy(num_classes=0), {"labels": None, "guidance": 2}, "guidance must be 1 without labels; got 2"),
        (Toy(label_dropout=0), {"guidance": 2}, "guidance must be 1 with a model that was not trained without classes"),
        (Toy(label_dropout=0), {"labels": [10]}, "labels must be from 0 to 9; got 10"),
        (nn.Identity().eval(), {}, "shape must be given for a model whose config has no in_channels"),
    ],
)
def test_models_that_do_not_go_with_the_arguments(model, arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        sample(model, **{"labels": [1], "seeds": [0], "steps": 3, **arguments})


@pytest.mark.parametrize("seeds", [np.array([4, 7]), torch.tensor([4, 7]), [np.int32(4), torch.tensor(7)]])
def test_integers_of_numpy_and_of_tensors(seeds):
    expected = sample(Toy(), [1, 2], seeds=[4, 7], steps=3)
    assert torch.equal(sample(Toy(), np.array([1, 2]), seeds=seeds, shape=(np.int64(3), 4, 4), steps=3), expected)


class Wrong(Toy):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, x, timestep, class_labels=None):
        return self.change(super().forward(x, timestep, class_labels))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:, :4], "output of the model must have 3 or 6 channels; got 4"),
        (lambda x: {"sample": x}, "output of the model must be a tensor; got dict"),
        (lambda x: x[0], r"output of the model must be \(B, C, H, W\); got \(6, 4, 4\)"),
        (lambda x: x[..., :2], "output of the model must be of 1 images of 4 x 4, as its input; got shape"),
    ],
)
def test_outputs_of_another_shape(change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        sample(Wrong(change), [1], seeds=[0], steps=3)
