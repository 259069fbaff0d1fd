"""Autoencoders between images and latents, in which latent diffusion works (Rombach et al., CVPR 2022).

They are diffusers' ``AutoencoderKL``; no weights ship, and a folder of them is opened by its path.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn


class VAE:
    """An autoencoder, in eval mode, with the scale that diffusion models expect of its latents.

    A latent is (z - shift) · scale, where z is what the autoencoder has: ``scaling_factor`` and ``shift_factor`` of its
    config, or the mean and deviation of every channel, ``latents_mean`` and ``latents_std``, where it has them.

    Args:
        autoencoder: a diffusers ``AutoencoderKL``, or a module with its ``encode``, ``decode`` and ``config``.

    Attributes:
        channels: of the images.
        latent_channels: of the latents.
        downsampling: how many times smaller a latent's sides are than the image's.
        scaling_factor: of its config.
    """

    def __init__(self, autoencoder: nn.Module) -> None:
        self.autoencoder: Any = autoencoder.eval().requires_grad_(False)
        config: Any = autoencoder.config
        self.channels: int = config.in_channels
        self.latent_channels: int = config.latent_channels
        self.downsampling: int = 2 ** (len(config.block_out_channels) - 1)
        self.scaling_factor: float = config.scaling_factor
        shift = getattr(config, "latents_mean", None) or [getattr(config, "shift_factor", None) or 0.0]
        deviation = getattr(config, "latents_std", None) or [1.0]
        self._shift = torch.tensor(shift).reshape(-1, 1, 1)
        self._scale = self.scaling_factor / torch.tensor(deviation).reshape(-1, 1, 1)

    @property
    def device(self) -> torch.device:
        return next(self.autoencoder.parameters()).device

    def to(self, device: torch.device | str) -> Self:
        """Move it to a device; returns itself."""
        self.autoencoder.to(device)
        return self

    def digest(self) -> str:
        """SHA-256 of its config and its weights, wherever they were read from."""
        config = {name: value for name, value in dict(self.autoencoder.config).items() if not name.startswith("_")}
        digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
        for name, tensor in self.autoencoder.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def check_channels(self, channels: int) -> None:
        """Raise ValueError unless latents have so many ``channels``, which a model takes."""
        if self.latent_channels != channels:
            raise ValueError(
                f"vae must have latents of {channels} channels, as the model takes; got one of {self.latent_channels}"
            )

    @torch.no_grad()
    def encode(self, images: Tensor, seeds: Sequence[int] | None = None) -> Tensor:
        """The latents of images.

        Args:
            images: (B, channels, H, W) floating point in [-1, 1]; H and W are multiples of ``downsampling``.
            seeds: one for each image, with which its latent is drawn from the distribution that the encoder gives,
                whatever the device; None takes the mean.

        Returns:
            (B, latent_channels, H / downsampling, W / downsampling) float32.

        Raises:
            ValueError: another shape, or another number of seeds.
        """
        self._check(images, "images", self.channels)
        if any(side % self.downsampling for side in images.shape[2:]):
            raise ValueError(
                f"images must have sides that are multiples of {self.downsampling}, by which the VAE makes them "
                f"smaller; got {images.shape[2]} x {images.shape[3]}"
            )
        if seeds is not None and len(seeds) != len(images):
            raise ValueError(f"seeds must be one for each of {len(images)} images; got {len(seeds)}")
        distribution = self.autoencoder.encode(self._placed(images)).latent_dist
        latents = distribution.mean
        if seeds is not None:
            noise = [torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
            latents = latents + distribution.std * torch.stack(noise).to(latents)
        return (latents.float() - self._shift.to(latents.device)) * self._scale.to(latents.device)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """The images of latents (B, latent_channels, h, w): (B, channels, H, W) float32 around [-1, 1], not clipped.

        Raises:
            ValueError: another shape.
        """
        self._check(latents, "latents", self.latent_channels)
        latents = latents.to(self.device, torch.float32)
        return self.autoencoder.decode(
            self._placed(latents / self._scale.to(self.device) + self._shift.to(self.device))
        ).sample.float()

    def _placed(self, values: Tensor) -> Tensor:
        parameter = next(self.autoencoder.parameters())
        return values.to(parameter.device, parameter.dtype)

    @staticmethod
    def _check(values: Tensor, name: str, channels: int) -> None:
        if values.dim() != 4 or values.shape[1] != channels or 0 in values.shape or not values.is_floating_point():
            raise ValueError(
                f"{name} must be (B, {channels}, H, W) floating point; got {tuple(values.shape)} {values.dtype}"
            )


def open_vae(path: str | os.PathLike[str]) -> VAE:
    """The AutoencoderKL of a folder, in float32 (half precision overflows in some), on the CPU.

    Args:
        path: the folder, with ``config.json`` and the weights; or a folder of a whole pipeline, whose ``vae`` is taken.

    Raises:
        ValueError: there is no AutoencoderKL, its files are damaged, or the weights do not fit one to one.
        ImportError: diffusers is not installed, or cannot be imported.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file() and (folder / "vae" / "config.json").is_file():
        folder = folder / "vae"
    if (kind := _class_in(folder)) != "AutoencoderKL":
        raise ValueError(f"vae must be a folder of an AutoencoderKL of diffusers; got {path}, which holds {kind}")
    try:
        from diffusers import AutoencoderKL
    except Exception as error:  # a library of its own that cannot be loaded raises whatever it likes
        if isinstance(error, ModuleNotFoundError) and error.name == "diffusers":
            raise ImportError("vae must be opened by diffusers: pip install 'ipt-fast[diffusion]'; got none") from error
        reason = " ".join(str(error).split())
        raise ImportError(
            f"vae must be opened by diffusers; got one that cannot be imported ({type(error).__name__}: {reason})"
        ) from error
    try:
        autoencoder, found = AutoencoderKL.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise ValueError(
            f"vae must be a folder of an AutoencoderKL that can be read; got {folder} ({error})"
        ) from error
    # diffusers draws what is missing at random, with no more than a note.
    if wrong := sorted({*found["missing_keys"], *found["unexpected_keys"]}):
        raise ValueError(f"vae must have weights that fit its config; got {folder}, where these do not: {wrong[:5]}")
    return VAE(autoencoder.float())


def _class_in(folder: Path) -> str:
    """The class that a folder's config names, or what stands there instead."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except OSError:
        return "no config.json"
    except (ValueError, RecursionError):
        return "a damaged config.json"
    return str(config.get("_class_name", "another model")) if isinstance(config, dict) else "a damaged config.json"
