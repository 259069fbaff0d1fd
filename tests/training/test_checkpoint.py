import pytest
import torch

from ipt_fast.training.checkpoint import load_checkpoint, save_checkpoint


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
