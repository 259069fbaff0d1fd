import numpy as np
import pytest
from PIL import Image

from ipt_fast.training.config import TrainingConfig

MICRO = {"width": 8, "depths": (2, 0, 0, 0), "window_size": 8, "grid_size": 4}


def write_images(folder):
    """Make a folder of three smooth synthetic images."""
    folder.mkdir()
    rows, columns = np.mgrid[:40, :48] / 10
    for index in range(3):
        waves = [np.sin(rows * (index + 1) + channel) * np.cos(columns) for channel in range(3)]
        Image.fromarray((127 + 100 * np.stack(waves, -1)).astype(np.uint8)).save(folder / f"{index}.png")


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    write_images(folder)
    return folder


@pytest.fixture
def make_config(images, tmp_path):
    """Build a configuration of a run that takes a second."""

    def make(out: str = "run", **changes) -> TrainingConfig:
        settings = {
            "model_config": MICRO,
            "iterations": 6,
            "patch_size": 16,
            "batch_size": 2,
            "warmup": 2,
            "log_every": 2,
            "save_every": 3,
            "ema": 0.5,
            "device": "cpu",
        }
        return TrainingConfig(images, tmp_path / out, **(settings | changes))

    return make


@pytest.fixture
def error_of_command(capsys):
    """The one line that a command has printed to stderr."""

    def read() -> str:
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return read
