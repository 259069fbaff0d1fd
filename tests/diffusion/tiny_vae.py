"""A tiny autoencoder of diffusers with random weights, saved as published ones are."""

import torch

from tests.oracles.public import public_module


def save_tiny_vae(folder, **config):
    """Write an AutoencoderKL that halves the sides; skips the calling test where diffusers is not installed."""
    diffusers = public_module("diffusers")
    fields = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (4, 4),
        "norm_num_groups": 2,
        "latent_channels": 4,
        "mid_block_add_attention": False,
    }
    torch.manual_seed(0)
    diffusers.AutoencoderKL(**fields | config).save_pretrained(folder)
    return folder
