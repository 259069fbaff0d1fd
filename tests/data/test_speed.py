"""How long data take: `pytest tests/data/test_speed.py -s` prints the milliseconds of CPU time that a patch takes."""

import time

import numpy as np
import pytest
import torch
from PIL import Image

import ipt_fast
from ipt_fast.data.dataset import Patches
from ipt_fast.data.degradations import DEGRADATIONS
from ipt_fast.data.stream import ImageStream, TrainingData

# Of a training step of the tiny model on the same patch, on the same machine: so one worker keeps up with the training.
LARGEST_SHARE = 0.2


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rows, columns = np.mgrid[:600, :700]
    noise = np.random.default_rng(0).integers(0, 60, (600, 700, 3))
    waves = 90 + 60 * np.sin(rows / 9)[..., None] * np.cos(columns / 7)[..., None]
    Image.fromarray((waves + noise).astype(np.uint8)).save(folder / "a.jpg")
    return folder


def milliseconds(action):
    """Of CPU time, which others on the machine do not lengthen much."""
    start = time.process_time()
    action()
    return 1e3 * (time.process_time() - start)


@pytest.fixture(scope="module")
def step():
    """Milliseconds of one training step on one patch of 128 x 128, the median of three."""
    model, patch = ipt_fast.create_model("ipt_v2_tiny"), torch.rand(1, 3, 128, 128)
    times = [milliseconds(lambda: model(patch).square().mean().backward()) for _ in range(4)][1:]
    return sorted(times)[1]


@pytest.mark.parametrize("kind", DEGRADATIONS)
def test_a_patch_takes_little_of_a_step(photos, step, kind):
    task = kind + ("4" if kind == "sr_x" else "")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        patches = Patches(TrainingData([ImageStream(photos)]), 128, {task: 1.0})
        times = [milliseconds(lambda number=number: patches[number]) for number in range(15)]
    finally:
        torch.set_num_threads(threads)
    print(f"\n{task}: {sorted(times)[7]:.1f} ms, a step {step:.0f} ms")
    assert sorted(times)[7] < LARGEST_SHARE * step
