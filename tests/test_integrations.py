"""Generators in diffusers: the loop of a scheduler, and its pipeline."""

import warnings

import pytest
import torch

import ipt_fast
from ipt_fast.integrations.diffusers import ForDiffusers
from tests.models.generators import conditions, randomised
from tests.oracles.public import public_module

CONFIGS = {
    "dit_s_2": {"width": 8, "layers": 1, "heads": 2, "sample_size": 8},
    "latent_ipt_v2_s": {"width": 4, "depths": (1, 1, 1), "heads": (1, 1, 1), "sample_size": 8},
}


def tiny(name, **config):
    return randomised(ipt_fast.create_model(name, **CONFIGS[name] | config)).eval()


@pytest.fixture(params=CONFIGS)
def name(request):
    return request.param


def test_call(name):
    model = tiny(name)
    adapted = ForDiffusers(model)
    config = adapted.config
    assert (config.sample_size, config.in_channels, config.out_channels) == (8, 4, 8)
    assert adapted.dtype == torch.float32 and adapted.device == torch.device("cpu")
    latents, timestep, labels = conditions(model)
    expected = model(latents, timestep, labels)
    assert torch.equal(adapted(latents, timestep=timestep, class_labels=labels).sample, expected)
    (found,) = adapted(latents, timestep=timestep, class_labels=labels, return_dict=False)
    assert torch.equal(found, expected)
    one = adapted(latents, torch.tensor(7), labels).sample
    assert torch.equal(one, adapted(latents, 7, labels).sample)
    assert torch.equal(one, model(latents, torch.tensor([7, 7]), labels))
    frozen = ForDiffusers(ipt_fast.freeze(model))
    assert frozen.dtype == torch.float32 and frozen.device == torch.device("cpu")
    with torch.no_grad():
        torch.testing.assert_close(frozen(latents, timestep, labels).sample, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model", ["dit_s_2", torch.nn.Identity()])
def test_other_modules(model):
    with pytest.raises(TypeError, match="model must be a module that generates, such as dit_s_2; got (str|Identity)"):
        ForDiffusers(model)
    with pytest.raises(TypeError, match="got IPTV2"):
        ForDiffusers(ipt_fast.create_model("ipt_v2_tiny"))


@torch.no_grad()
def test_the_loop_of_a_scheduler(name):
    """With the learned range of the variance, as the model was trained."""
    diffusers = public_module("diffusers")
    model, generator = ForDiffusers(tiny(name)), torch.Generator().manual_seed(0)
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range", clip_sample=False)
    scheduler.set_timesteps(5)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    for timestep in scheduler.timesteps:
        predicted = model(latents, timestep=timestep, class_labels=torch.tensor([3, 1000])).sample
        latents = scheduler.step(predicted, timestep, latents, generator=generator).prev_sample
    assert latents.shape == (2, 4, 8, 8) and latents.isfinite().all()


def test_the_pipeline(name):
    diffusers = public_module("diffusers")
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4,),
        norm_num_groups=2,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        layers_per_block=1,
    )
    model = ForDiffusers(tiny(name))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = diffusers.DiTPipeline(model, vae, diffusers.DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)

    def run(seed, scale=4.0):
        generator = torch.Generator().manual_seed(seed)
        options = dict(num_inference_steps=3, guidance_scale=scale, output_type="pt")
        return pipeline([1, 999], generator=generator, **options).images

    first = run(0)
    assert first.shape == (2, 3, 8, 8) and torch.equal(run(0), first)
    assert not torch.equal(run(1), first) and not torch.equal(run(0, scale=1.0), first)
