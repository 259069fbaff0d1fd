"""Training: configuration, losses, checkpoints and the loop."""

from .config import TrainingConfig
from .loop import train

__all__ = ["TrainingConfig", "train"]
