"""A run that is killed at any moment loses at most one interval, and goes on to bitwise the same result."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ipt_fast.training.checkpoint import load_checkpoint
from ipt_fast.training.config import TrainingConfig
from tests.training.conftest import MICRO, write_images
from tests.training.test_loop import assert_equal_states, read_log, without_times

# {moment: (killed at that iteration, the iteration that is saved then)}, of a run that saves every other one
ALONE = {
    "after_step": (1, 0),
    "in_first_checkpoint": (2, 0),
    "in_log": (3, 2),
    "in_checkpoint": (4, 2),
    "before_model": (4, 4),
    "in_model": (4, 4),
    "before_others_go": (4, 4),
}
TOGETHER = {
    "after_step": (5, 4),
    "in_shards": (4, 2),
    "in_checkpoint": (4, 2),
    "before_others_go": (4, 4),
}


def settings(folder, out, **changes):
    usual = {"model_config": MICRO, "patch_size": 16, "batch_size": 2, "warmup": 2, "ema": 0.5, "device": "cpu"}
    places = {"data": str(folder / "images"), "out": str(folder / out)}
    return {**usual, **places, "iterations": 6, "save_every": 2, "log_every": 1, **changes}


def perform(folder, moments, processes, **changes):
    """{moment: what was left}; "whole" is the run that is not killed."""
    write_images(folder / "images")
    calls = [{"settings": settings(folder, "whole", **changes), "processes": processes}]
    for moment, (iteration, _) in moments.items():
        call = {"settings": settings(folder, moment, **changes), "processes": processes}
        calls.append({**call, "moment": moment, "iteration": iteration})
    (folder / "calls.json").write_text(json.dumps(calls))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, Path(__file__).with_name("killed_runs.py"), folder / "calls.json", folder / "left.json"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-4000:]
    return dict(zip(["whole", *moments], json.loads((folder / "left.json").read_text()), strict=True))


def check(folder, moment, left, saved, processes):
    assert left["statuses"][0] == -9 and len(left["statuses"]) == processes
    assert set(left["statuses"]) <= {-9, 1}  # another process may fail for want of the first, before it is killed
    assert left["iteration"] == saved
    configs = [TrainingConfig(**settings(folder, out)) for out in ("whole", moment)]
    assert_equal_states(*(load_file(config.out / "model.safetensors") for config in configs))
    assert without_times(read_log(configs[0])) == without_times(read_log(configs[1]))
    names = [sorted(path.name for path in config.out.iterdir()) for config in configs]
    assert names[0] == names[1]  # nothing is left of what was interrupted
    return configs


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return folder, perform(folder, ALONE, 1)


@pytest.mark.parametrize("moment", ALONE)
def test_a_kill_loses_at_most_one_interval(alone, moment):
    folder, left = alone
    configs = check(folder, moment, left[moment], ALONE[moment][1], processes=1)
    assert_equal_states(*(load_checkpoint(config.out / "checkpoint.pth") for config in configs))
    if moment in ("in_checkpoint", "in_first_checkpoint", "in_model"):
        assert left[moment]["hidden"]  # it was killed in the middle of a file


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    folder = tmp_path_factory.mktemp("together")
    return folder, perform(folder, TOGETHER, 2, strategy="fsdp")


@pytest.mark.slow
@pytest.mark.parametrize("moment", TOGETHER)
def test_a_kill_of_sharded_processes(together, moment):
    folder, left = together
    check(folder, moment, left[moment], TOGETHER[moment][1], processes=2)
    if moment == "in_shards":
        assert left[moment]["hidden"] == [".checkpoint-00000004"]
