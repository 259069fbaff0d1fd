import errno
import resource
import warnings

import pytest
import torch

from ipt_fast.training.checkpoint import (
    find_checkpoint,
    load_checkpoint,
    load_sharded,
    remove_others,
    save_checkpoint,
    save_sharded,
    stored_names,
)
from ipt_fast.training.distributed import World


def test_round_trip(tmp_path):
    path = tmp_path / "checkpoint.pth"
    state = {"weights": torch.randn(3), "config": {"sigma": (5.0, 50.0), "out": "x", "val": None}, "iteration": 4}
    save_checkpoint(path, state)
    loaded = load_checkpoint(path)
    assert torch.equal(loaded.pop("weights"), state.pop("weights")) and loaded == state
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint.pth"]


def test_a_crash_while_saving_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pth"
    save_checkpoint(path, {"iteration": 1})

    def crash(state, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(OSError, match="cannot write .*checkpoint.pth: disk full"):
        save_checkpoint(path, {"iteration": 2})
    assert load_checkpoint(path) == {"iteration": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint.pth"]


def test_bad_checkpoints(tmp_path):
    path = tmp_path / "checkpoint.pth"
    with pytest.raises(ValueError, match="must be a file of a training run to resume"):
        load_checkpoint(path)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="must be a readable file of a training run; got"):
        load_checkpoint(path)
    torch.save({"weights": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="must be a file of a training run"):
        load_checkpoint(path)
    save_checkpoint(path, {"weights": torch.ones(100)})
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="must be a readable file of a training run; got"):
        load_checkpoint(path)


def test_one_wrong_bit_is_noticed(tmp_path):
    path = tmp_path / "checkpoint.pth"
    weights = torch.full((1000,), 1.5)
    save_checkpoint(path, {"weights": weights})
    data = bytearray(path.read_bytes())
    data[data.index(weights.numpy().tobytes()) + 2000] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        ValueError, match=r"must be a readable file of a training run; got .*checkpoint\.pth .*checksum"
    ):
        load_checkpoint(path)


def test_a_pickled_object_is_refused_in_one_line(tmp_path):
    path = tmp_path / "checkpoint.pth"
    torch.save(torch.nn.Linear(2, 2), path)
    with pytest.raises(ValueError, match="must be a readable file of a training run; got") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)


# Folders


def save_folder(out, iteration=7):
    tensors = {"model.weight": torch.randn(1000), "step": torch.tensor(float(iteration))}
    return save_sharded(out, tensors, {"iteration": iteration, "rng": torch.get_rng_state()}, World()), tensors


def zeros_like(tensors):
    return {name: torch.zeros_like(value) for name, value in tensors.items()}


def test_round_trip_of_a_folder(tmp_path):
    with warnings.catch_warnings(action="error"):
        folder, tensors = save_folder(tmp_path)
        found = zeros_like(tensors)
        load_sharded(folder, found, World())
    assert folder.name == "checkpoint-00000007" and [entry.name for entry in tmp_path.iterdir()] == [folder.name]
    assert load_checkpoint(folder)["iteration"] == 7 and sorted(stored_names(folder)) == ["model.weight", "step"]
    assert all(torch.equal(found[name], value) for name, value in tensors.items())


def test_the_newest_checkpoint(tmp_path):
    assert find_checkpoint(tmp_path) == tmp_path / "checkpoint.pth"  # where there is none
    nine = save_folder(tmp_path, 9)[0]
    ten = save_folder(tmp_path, 10)[0]
    (tmp_path / "checkpoint-old").mkdir()
    (tmp_path / ".checkpoint-00000011").mkdir()  # a save that was killed
    assert find_checkpoint(tmp_path) == ten
    save_checkpoint(tmp_path / "checkpoint.pth", {"iteration": 8})
    assert find_checkpoint(tmp_path) == ten
    save_checkpoint(tmp_path / "checkpoint.pth", {"iteration": 12})
    assert find_checkpoint(tmp_path) == tmp_path / "checkpoint.pth"
    remove_others(tmp_path, ten)
    assert sorted(path.name for path in tmp_path.iterdir()) == [ten.name, "checkpoint-old"] and not nine.exists()


def test_bad_folders(tmp_path):
    folder, tensors = save_folder(tmp_path)
    said = "checkpoint must be a readable folder of a training run; got .*checkpoint-00000007 "
    with pytest.raises(ValueError, match=said + r"\(Size mismatch .*\)$"):
        load_sharded(folder, {"model.weight": torch.zeros(999)}, World())
    with pytest.raises(ValueError, match=said + r"\(Missing key .*bias\.\)$"):
        load_sharded(folder, {"model.bias": torch.zeros(999)}, World())
    (shards,) = folder.glob("*.distcp")
    shards.write_bytes(shards.read_bytes()[:2000])
    with pytest.raises(ValueError, match=said) as raised:
        load_sharded(folder, zeros_like(tensors), World())
    assert "\n" not in str(raised.value)
    (folder / "run.pth").unlink()
    with pytest.raises(ValueError, match=r"must be a file of a training run to resume; got .*run\.pth, which is not"):
        load_checkpoint(folder)
    (folder / ".metadata").write_bytes(b"none")
    with pytest.raises(ValueError, match=said):
        stored_names(folder)


def test_no_space_for_a_folder(tmp_path):
    folder, _ = save_folder(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(OSError, match="^cannot write .*checkpoint-00000008: ") as raised:
            save_folder(tmp_path, 8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(raised.value)
    assert find_checkpoint(tmp_path) == folder
    save_folder(tmp_path, 8)
    assert find_checkpoint(tmp_path).name == "checkpoint-00000008"


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / ".checkpoint-00000007").write_text("")
    with pytest.raises(OSError, match="^cannot write .*checkpoint-00000007: File exists$") as raised:
        save_folder(tmp_path)
    assert raised.value.errno == errno.EEXIST
