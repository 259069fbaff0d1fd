"""What the tests of models that generate have in common."""

import torch


def randomised(model):
    """Random weights where a new model has zeros: no gate at its start can hide a mistake."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def conditions(model, batch=2, size=None):
    """(latents, timestep, class_labels) for ``model``."""
    config, size = model.config, size or model.config.sample_size
    labels = torch.randint(config.num_classes, (batch,)) if config.num_classes else None
    return torch.randn(batch, config.in_channels, size, size), torch.randint(1000, (batch,)), labels
