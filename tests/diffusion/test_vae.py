"""Autoencoders by path: what diffusers computes with the same weights, the scale of latents, and what is refused."""

import json
import sys

import pytest
import safetensors.torch
import torch

from ipt_fast.diffusion.vae import open_vae
from tests.diffusion.tiny_vae import save_tiny_vae
from tests.oracles.public import public_module

IMAGES = torch.rand(3, 3, 8, 12, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def vae(folder):
    return open_vae(folder)


@pytest.fixture(scope="module")
def original(folder):
    return public_module("diffusers").AutoencoderKL.from_pretrained(folder).eval()


def test_what_it_tells(vae):
    assert (vae.channels, vae.latent_channels, vae.downsampling) == (3, 4, 2)
    assert not vae.autoencoder.training


def test_latents_are_scaled_means(vae, original):
    latents = vae.encode(IMAGES)
    assert latents.shape == (3, 4, 4, 6) and latents.dtype == torch.float32 and not latents.requires_grad
    torch.testing.assert_close(latents, original.encode(IMAGES).latent_dist.mean.detach() * 0.18215)


def test_decoding_undoes_the_scale(vae, original):
    latents = torch.randn(2, 4, 4, 6)
    expected = original.decode(latents / 0.18215).sample.detach()
    torch.testing.assert_close(vae.decode(latents), expected)
    torch.testing.assert_close(vae.decode(latents.double()), expected)


def test_a_draw_is_that_of_its_own_seed(vae, original):
    drawn = vae.encode(IMAGES, [5, 6, 7])
    torch.testing.assert_close(vae.encode(IMAGES[1:], [6, 7]), drawn[1:])
    distribution = original.encode(IMAGES[:1]).latent_dist
    noise = torch.randn(4, 4, 6, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(drawn[:1], ((distribution.mean + distribution.std * noise) * 0.18215).detach())
    assert not torch.equal(drawn[1], vae.encode(IMAGES[1:2], [5])[0])


@pytest.mark.parametrize(
    ("config", "shift", "scale"),
    [
        ({"scaling_factor": 0.36, "shift_factor": 0.12}, 0.12, 0.36),
        ({"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 3.0, 4.0], "scaling_factor": 0.5},
         torch.tensor([0.1, 0.2, 0.3, 0.4]).reshape(4, 1, 1),
         0.5 / torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(4, 1, 1)),
    ],
)  # fmt: skip
def test_shift_and_scale_of_the_config(tmp_path, config, shift, scale):
    vae = open_vae(save_tiny_vae(tmp_path, **config))
    z = vae.autoencoder.encode(IMAGES).latent_dist.mean
    torch.testing.assert_close(vae.encode(IMAGES), (z - shift) * scale)
    torch.testing.assert_close(vae.decode((z - shift) * scale), vae.autoencoder.decode(z).sample)


def test_the_vae_of_a_pipeline(tmp_path, vae):
    save_tiny_vae(tmp_path / "vae")
    assert torch.equal(open_vae(tmp_path).encode(IMAGES), vae.encode(IMAGES))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda vae: vae.encode(IMAGES[:, :1]), r"images must be \(B, 3, H, W\) floating point; got \(3, 1, 8, 12\)"),
        (lambda vae: vae.encode(IMAGES[..., :7]), "images must have sides that are multiples of 2.*got 8 x 7"),
        (lambda vae: vae.encode(IMAGES, [1]), "seeds must be one for each of 3 images; got 1"),
        (lambda vae: vae.decode(IMAGES), r"latents must be \(B, 4, H, W\) floating point; got \(3, 3, 8, 12\)"),
        (lambda vae: vae.check_channels(16), "vae must have latents of 16 channels, as the model takes; got one of 4"),
    ],
)
def test_wrong_arguments(vae, call, message):
    with pytest.raises(ValueError, match=message):
        call(vae)


def test_folders_of_something_else(tmp_path):
    with pytest.raises(ValueError, match="vae must be a folder of an AutoencoderKL of .*; got .*, which holds no conf"):
        open_vae(tmp_path / "none")
    for content, what in (("{", "a damaged config.json"), ("{}", "another model"), ('{"_class_name": "UNet"}', "UNet")):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=f"which holds {what}$"):
            open_vae(tmp_path)


def test_weights_that_do_not_fit(tmp_path):
    folder = save_tiny_vae(tmp_path)
    file = folder / "diffusion_pytorch_model.safetensors"
    state = safetensors.torch.load_file(file)
    removed = state.pop("quant_conv.bias")
    safetensors.torch.save_file(state, file)
    with pytest.raises(ValueError, match=r"vae must have weights that fit its config; got .*\['quant_conv.bias'\]"):
        open_vae(folder)
    safetensors.torch.save_file(state | {"quant_conv.bias": removed[:1]}, file)
    with pytest.raises(ValueError, match="vae must be a folder of an AutoencoderKL that can be read"):
        open_vae(folder)
    file.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="vae must be a folder of an AutoencoderKL that can be read"):
        open_vae(folder)


def test_without_diffusers_the_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"pip install 'ipt-fast\[diffusion\]'"):
        open_vae(tmp_path)


def test_a_diffusers_that_cannot_be_imported_is_named_with_the_reason(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    (tmp_path / "diffusers.py").write_text("raise RuntimeError('operator torchvision::nms\\n does not exist')")
    monkeypatch.delitem(sys.modules, "diffusers", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    reason = r"cannot be imported \(RuntimeError: operator torchvision::nms does not exist\)$"
    with pytest.raises(ImportError, match=f"^vae must be opened by diffusers; got one that {reason}") as raised:
        open_vae(tmp_path)
    assert isinstance(raised.value.__cause__, RuntimeError)
    (tmp_path / "diffusers.py").write_text("import of_another_library")
    with pytest.raises(ImportError, match="ModuleNotFoundError: No module named 'of_another_library'"):
        open_vae(tmp_path)
