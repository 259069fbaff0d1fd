"""Several processes: what is wrong in any of them is said once, and saved before."""

import os
import subprocess
import sys

import pytest

from ipt_fast.training.checkpoint import find_checkpoint, load_checkpoint
from ipt_fast.training.distributed import World

PROGRAM = """
import os, sys
from ipt_fast.cli import main
from ipt_fast.training import loop
from ipt_fast.training.objectives import Pretraining

dataset = Pretraining.dataset

class Breaking:
    def __init__(self, whole):
        self.whole = whole

    def __getitem__(self, number):
        if number >= 2 * 4 and os.environ["RANK"] == "1":
            if how == "--break":
                raise ValueError("cannot read image x.png")
            degraded, *others = self.whole[number]
            return degraded * float("nan"), *others
        return self.whole[number]

for how in {"--break", "--poison"} & set(sys.argv):
    sys.argv.remove(how)
    Pretraining.dataset = lambda self, *sizes: Breaking(dataset(self, *sizes))
sys.exit(main(sys.argv[1:]))
"""
MODEL = '{"tasks": ["derain"], "image_size": 12, "patch_size": 3, "features": 4, "layers": 1, "heads": 3}'


@pytest.fixture
def torchrun(images, tmp_path):
    def start(*options):
        (tmp_path / "program.py").write_text(PROGRAM)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += [tmp_path / "program.py", "train", "--data", images, "--out", tmp_path / "a" / "run"]
        command += ["--model", "ipt", "--model-config", MODEL, "--iterations", "4", "--device", "cpu", *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        return subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=600)

    return start


def test_what_fails_in_one_process_is_saved_and_said_by_the_first(torchrun, tmp_path):
    result = torchrun("--batch-size", "4", "--break")
    assert result.returncode != 0
    said = [line for line in result.stderr.splitlines() if line.startswith("ipt-fast:")]
    out = tmp_path / "a" / "run"
    assert said == [f"ipt-fast: error: cannot read image x.png; the 2 iterations before it are saved in {out}"]
    assert load_checkpoint(out / "checkpoint.pth")["iteration"] == 2
    (tmp_path / "images" / "notes.txt").write_text("")
    result = torchrun("--batch-size", "4", "--resume")
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stderr.count("ipt-fast: warning: left out of") == 1
    assert result.stdout.count("finished 4 iterations") == 1


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_what_is_not_finite_in_one_process_is_found_and_said_by_the_first(torchrun, tmp_path, strategy):
    result = torchrun("--batch-size", "4", "--save-every", "1", "--poison", "--strategy", strategy)
    assert result.returncode != 0
    (said,) = [line for line in result.stderr.splitlines() if line.startswith("ipt-fast:")]
    out = tmp_path / "a" / "run"
    assert said.startswith("ipt-fast: error: training diverged: gradients are not finite after 2 iterations, loss ")
    found = "the batch is not finite, and so the output of sub_mean (MeanShift) is not"
    assert said.endswith(f": {found}; the last checkpoint in {out} is kept")
    assert load_checkpoint(find_checkpoint(out))["iteration"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", "3"], "batch_size must be a multiple of the 2 processes; got 3"),
        pytest.param(["--lr", "-1"], "lr must be in", marks=pytest.mark.slow),
        pytest.param(["--device", "meta"], "device must be usable; got meta", marks=pytest.mark.slow),
    ],
)
def test_a_wrong_call_is_said_once(torchrun, tmp_path, options, message):
    result = torchrun(*options)
    assert result.returncode != 0
    assert result.stderr.count("ipt-fast: error:") == 1 and message in result.stderr, result.stderr[-3000:]
    assert not (tmp_path / "a").exists()


def test_alone_everything_stays_as_it_is():
    world = World()
    assert world.together(lambda: 3) == 3 and not world.any(False) and world.any(True)
    world.fail(None)
    with pytest.raises(OSError, match="full"):
        world.fail(OSError("full"))
    with pytest.raises(KeyError):
        world.together(lambda: {}["a"])
