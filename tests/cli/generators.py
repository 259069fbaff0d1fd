"""Tiny generators with random weights, and a command line that uses them."""

import torch

import ipt_fast

TINY_DIT = {"width": 8, "layers": 1, "heads": 2, "sample_size": 4, "num_classes": 3}


def save_generator(folder, name="dit_s_2", **config):
    """A saved model, by default a DiT of 8 channels, whose output is not zero, as that of a new one is."""
    torch.manual_seed(0)
    model = ipt_fast.create_model(name, **(TINY_DIT if name == "dit_s_2" else {}) | config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    return folder
