"""Training: configuration, losses, checkpoints and the loop."""
