"""Two processes with half of every batch each are one with the whole, whatever the strategy; any number can go on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ipt_fast import _extension
from ipt_fast.models import open_model
from ipt_fast.training.checkpoint import find_checkpoint, load_checkpoint
from ipt_fast.training.config import TrainingConfig
from ipt_fast.training.run import Run
from tests.training.conftest import MICRO, write_images
from tests.training.parallel_runs import perform
from tests.training.test_loop import TIMES, read_log

V2 = {"model_config": MICRO, "patch_size": 16}
TINY = {"image_size": 12, "patch_size": 3, "features": 4, "layers": 1, "heads": 3}
IPT = {"model": "ipt", "model_config": {"tasks": ["sr_x2", "derain", "denoise30"], **TINY}, "loss": "l1"}
# No label is dropped, as each process draws that by itself.
CLASSES = {"in_channels": 3, "sample_size": 8, "num_classes": 2, "label_dropout": 0}
DIT = {"model": "dit_s_2", "model_config": {**CLASSES, "width": 16, "layers": 1, "heads": 2}, "task": "generate"}
LATENT_SHAPE = {**CLASSES, "width": 8, "depths": [1, 2, 1], "heads": [1, 1, 1], "window_size": 4, "grid_size": 4}
LATENT = {**DIT, "model": "latent_ipt_v2_s", "model_config": LATENT_SHAPE}
ONE_TASK = {**IPT, "model_config": {"tasks": ["derain"], **TINY}}
# {what two processes do: (settings, of the same run on one process)}
RUNS = {
    "v2_ddp": ({}, V2),
    "v2_fsdp_parts": ({"strategy": "fsdp", "accumulate": 2, "activation_checkpointing": True}, V2),
    "ipt_ddp": ({}, {**IPT, "weight_decay": 0.1}),
    "dit_ddp": ({}, DIT),
}
MORE_RUNS = {
    "ipt_ddp_contrastive": ({}, {**IPT, "contrastive": 0.1}),
    "v2_fsdp": ({"strategy": "fsdp"}, V2),
    "v2_ddp_parts": ({"accumulate": 2, "activation_checkpointing": True}, V2),
    "v2_fsdp_bf16": ({"strategy": "fsdp"}, {**V2, "amp": "bf16"}),
    "ipt_ddp_parts": ({"accumulate": 2, "activation_checkpointing": True}, IPT),
    "ipt_fsdp": ({"strategy": "fsdp"}, IPT),
    "ipt_fsdp_bf16": ({"strategy": "fsdp"}, {**IPT, "amp": "bf16"}),
    "ipt_one_task": ({}, ONE_TASK),
    "dit_fsdp": ({"strategy": "fsdp"}, DIT),
    "latent_fsdp_parts": ({"strategy": "fsdp", "accumulate": 2, "activation_checkpointing": True}, LATENT),
}


def by_two_processes(folder, runs):
    """Perform runs, one after the other, on two processes."""
    (folder / "runs.json").write_text(json.dumps(runs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(Path(__file__).with_name("parallel_runs.py")), str(folder / "runs.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-4000:]
    assert "Warning" not in result.stderr, result.stderr


def perform_all(folder, runs, strategy):
    """Runs of two processes, one that one process has started, and one that is left for one to finish."""
    chosen = {**V2, "strategy": strategy}
    assert perform(settings(folder, f"continued_{strategy}", V2), stop=3) == 3
    calls = [{"settings": settings(folder, name, {**kind, **how})} for name, (how, kind) in runs.items()]
    calls.append({"settings": settings(folder, f"started_{strategy}", chosen), "stop": 3})
    calls.append({"settings": settings(folder, f"continued_{strategy}", chosen), "resume": True})
    by_two_processes(folder, calls)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    write_images(folder / "images")
    perform_all(folder, RUNS, "fsdp")
    return folder


@pytest.fixture(scope="module")
def more(folder):
    """The same folder, and in it what is slow."""
    perform_all(folder, MORE_RUNS, "ddp")
    return folder


def settings(folder, out, changes):
    usual = {"iterations": 5, "batch_size": 4, "warmup": 2, "log_every": 1, "save_every": 2, "ema": 0.5}
    places = {"data": str(folder / "images"), "val": str(folder / "images"), "out": str(folder / out)}
    return {**usual, **places, "device": "cpu", **changes}


def config_of(folder, out, changes):
    return TrainingConfig(**settings(folder, out, changes))


@pytest.fixture(scope="module")
def alone(folder):
    """The configuration of the run on one process that has these settings."""
    done = {}

    def run(kind):
        name = f"alone{len(done)}"
        key = json.dumps(kind)
        if key not in done:
            assert perform(settings(folder, name, kind)) == 5
            done[key] = config_of(folder, name, kind)
        return done[key]

    return run


def assert_same_run(one, other, tolerance):
    """Rows of the logs, and weights: of an Adam that has moved them by up to 1e-3 in five steps."""
    for row, same in zip(read_log(one), read_log(other), strict=True):
        for name in row.keys() - set(TIMES) - {"psnr"}:
            assert (row[name] == "") == (same[name] == ""), name
            if row[name]:
                assert float(row[name]) == pytest.approx(float(same[name]), rel=max(2e-2 * tolerance, 2e-5)), name
        assert (row["psnr"] == "") == (same["psnr"] == "")
        if row["psnr"]:
            assert abs(float(row["psnr"]) - float(same["psnr"])) < 0.002
    first, second = (load_file(config.out / "model.safetensors") for config in (one, other))
    assert first.keys() == second.keys()
    distance = max((first[name].double() - second[name].double()).abs().max().item() for name in first)
    assert distance < 1e-3 * tolerance


def compare(folder, alone, name, how, kind):
    other = config_of(folder, name, {**kind, **how})
    # Rounding to bfloat16, and directions in which the loss hardly changes, where Adam follows the rounding.
    loose = kind.get("amp") == "bf16" or "contrastive" in kind
    assert_same_run(alone(kind), other, tolerance=1 if loose else 5e-3)
    found = sorted(path.name for path in other.out.iterdir())
    saved = "checkpoint-00000005" if "fsdp" in name else "checkpoint.pth"
    assert found == [saved, "config.json", "log.csv", "model.safetensors", "recipe.yml"]
    assert open_model(other.out).config == open_model(alone(kind).out).config


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_are_one(folder, alone, name):
    compare(folder, alone, name, *RUNS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_RUNS)
def test_two_processes_are_one_in_every_way(more, alone, name):
    compare(more, alone, name, *MORE_RUNS[name])


def test_heads_without_a_batch_stay_as_they_are(folder, alone):
    """Of another task than the batches': neither decayed nor moved, as on one process."""
    states = [
        load_checkpoint(config.out / "checkpoint.pth")["optimizer"]["state"]
        for config in (alone(RUNS["ipt_ddp"][1]), config_of(folder, "ipt_ddp", IPT))
    ]
    assert states[0].keys() == states[1].keys()
    for number, entry in states[0].items():
        assert entry["step"] == states[1][number]["step"]


def check_going_on(folder, alone, strategy):
    """One process with a run of two, and two with a run of one."""
    started, continued = (config_of(folder, f"{how}_{strategy}", V2) for how in ("started", "continued"))
    saved = find_checkpoint(started.out)
    assert saved.name == ("checkpoint-00000003" if strategy == "fsdp" else "checkpoint.pth")
    assert load_checkpoint(saved)["iteration"] == 3
    assert perform(settings(folder, started.out.name, V2), resume=True) == 5
    assert find_checkpoint(started.out).name == "checkpoint.pth" and not list(started.out.glob("checkpoint-*"))
    assert find_checkpoint(continued.out).is_dir() == (strategy == "fsdp")
    assert (continued.out / "checkpoint.pth").exists() == (strategy == "ddp")
    for config in (started, continued):
        assert_same_run(alone(V2), config, tolerance=5e-3)


def test_another_number_of_processes_goes_on(folder, alone):
    check_going_on(folder, alone, "fsdp")


@pytest.mark.slow
def test_another_number_of_replicas_goes_on(more, alone):
    check_going_on(more, alone, "ddp")


def test_what_is_sharded_is_all_of_the_state(folder, alone):
    """Loaded by one process, the folder has what the file of one process has."""
    run = Run(config_of(folder, "v2_fsdp_parts", V2), resume=True)
    expected = Run(alone(V2), resume=True)
    assert run.iteration == expected.iteration == 5 and run.count == expected.count
    for one, other in (
        (run.model.state_dict(), expected.model.state_dict()),
        (run.average.state_dict(), expected.average.state_dict()),
        (run._tensors(), expected._tensors()),
    ):
        assert one.keys() == other.keys()
        for name, value in one.items():
            torch.testing.assert_close(value, other[name], rtol=1e-4, atol=5e-6, msg=name)


@pytest.mark.skipif(not _extension.load(), reason=str(_extension.error()))
def test_layers_are_fused_where_they_are_sharded(tmp_path):
    """The runs above are on the C++ kernels: sharded layers have nothing against being fused."""
    from torch.distributed.fsdp import fully_shard

    from ipt_fast import explain
    from ipt_fast.models import create_model
    from ipt_fast.training.parallel import transformer_layers

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = create_model("ipt_v2_tiny", **MICRO)
        reasons = []
        layers = transformer_layers(model)
        for layer in layers.values():
            fully_shard(layer, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
            forward = layer.forward
            layer.forward = lambda x, f=forward, m=layer: (reasons.append(explain(m)), f(x))[1]
        model(torch.rand(1, 3, 16, 16)).sum().backward()
        assert len(layers) == len(reasons) == 4
        assert all(set(found.values()) == {None} for found in reasons)
    finally:
        torch.distributed.destroy_process_group()
