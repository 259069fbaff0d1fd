"""Latents in a folder: what is written is read, any one by its number, and what is damaged is refused."""

import json
import pickle

import pytest
import torch

from ipt_fast.data.latents import (
    INDEX,
    CachedLatents,
    LatentsInfo,
    is_latents,
    shard_metadata,
    shard_path,
    write_index,
    write_shard,
)

INFO = LatentsInfo((2, 3, 4), ("cat", "dog"), True, 32, {"scaling_factor": 0.18215})


def tensors(samples, seed=0):
    generator = torch.Generator().manual_seed(seed)
    latents, mirrored = (torch.randn(samples, 2, 3, 4, generator=generator) for _ in range(2))
    return latents, torch.arange(samples) % 2, mirrored


@pytest.fixture
def folder(tmp_path):
    for number, samples in enumerate((3, 1, 2)):
        write_shard(tmp_path / "latents", number, *tensors(samples, number))
    write_index(tmp_path / "latents", INFO, (3, 1, 2))
    return tmp_path / "latents"


def test_every_latent_is_read_as_it_was_written(folder):
    cache = CachedLatents(folder)
    assert len(cache) == 6 and cache.info == INFO
    assert cache.shape == (2, 3, 4) and cache.classes == ("cat", "dog")
    expected = [entry for seed, samples in enumerate((3, 1, 2)) for entry in zip(*tensors(samples, seed), strict=True)]
    for number in (5, 0, 3, 1, 2, 4):
        latents, label, mirrored = expected[number]
        assert torch.equal(cache.example(number)[0], latents) and cache.example(number)[1] == label
        assert torch.equal(cache.example(number, mirrored=True)[0], mirrored)
    assert cache.labels.tolist() == [int(label) for _, label, _ in expected]
    assert torch.equal(pickle.loads(pickle.dumps(cache)).example(4)[0], expected[4][0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_as_float32(tmp_path, dtype):
    latents, labels, _ = tensors(2)
    write_shard(tmp_path, 0, latents.to(dtype), labels)
    write_index(tmp_path, LatentsInfo((2, 3, 4), ("cat", "dog")), (2,))
    read, _ = CachedLatents(tmp_path).example(1)
    assert torch.equal(read, latents[1].to(dtype).float()) and read.dtype == torch.float32


def test_metadata_tells_of_a_whole_shard(tmp_path):
    write_shard(tmp_path, 0, *tensors(2), metadata={"sources": "abc"})
    path = shard_path(tmp_path, 0)
    assert shard_metadata(path) == {"sources": "abc"}
    assert shard_metadata(shard_path(tmp_path, 1)) is None
    path.write_bytes(path.read_bytes()[:-10])
    assert shard_metadata(path) is None
    assert not is_latents(tmp_path)  # as there is no index yet


def test_fingerprint(folder):
    before = CachedLatents(folder).fingerprint()
    assert before["images"] == 6
    folder.rename(folder.with_name("moved"))
    moved = folder.with_name("moved")
    assert CachedLatents(moved).fingerprint() == before
    write_shard(moved, 2, *tensors(3))
    write_index(moved, INFO, (3, 1, 3))
    assert CachedLatents(moved).fingerprint() != before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": torch.zeros(2, 3, 4)}, r"latents must be \(N, C, h, w\) in float32, .* got \(2, 3, 4\)"),
        ({"latents": torch.zeros(2, 2, 3, 4, dtype=torch.int64)}, "latents must be .* got .* torch.int64"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, r"labels must be \(2,\) int64, .* got \(3,\) torch.int64"),
        ({"labels": torch.zeros(2)}, r"labels must be \(2,\) int64, .* got \(2,\) torch.float32"),
        ({"mirrored": torch.zeros(1, 2, 3, 4)}, r"mirrored must be \(2, 2, 3, 4\) torch.float32, as latents"),
    ],
)
def test_wrong_tensors_are_not_written(tmp_path, change, message):
    arguments = dict(zip(("latents", "labels", "mirrored"), tensors(2), strict=True))
    with pytest.raises(ValueError, match=message):
        write_shard(tmp_path, 0, **{**arguments, **change})
    assert not shard_path(tmp_path, 0).exists()


def change_index(folder, **changes):
    content = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps({**content, **changes}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / INDEX).unlink(), "latents.json must be there and readable JSON"),
        (lambda folder: (folder / INDEX).write_text("{"), "latents.json must be there and readable JSON"),
        (lambda folder: (folder / INDEX).write_text("[]"), "latents.json must be one that ipt-fast encode wrote"),
        (lambda folder: change_index(folder, version=2), "version in .* must be 1; got 2"),
        (lambda folder: change_index(folder, shards=None), "must be whole; got one that is damaged"),
        (lambda folder: change_index(folder, shape=[2, 3]), "must be whole; got one that is damaged"),
        (lambda folder: change_index(folder, shards=[]), "must have latents; got none"),
        (lambda folder: change_index(folder, shards=[{"file": "../x", "samples": 1}]), "shards in .* must have names"),
        (lambda folder: change_index(folder, shape=[4, 3, 4]), r"latents in .* must have shape \(3, 4, 3, 4\); got \("),
        (lambda folder: change_index(folder, classes=["cat"]), "labels in .* must be from 0 to 0; got 0 to 1"),
        (lambda folder: shard_path(folder, 1).unlink(), "must be a shard of latents; got a missing or damaged"),
        (
            lambda folder: shard_path(folder, 1).write_bytes(b"1"),
            "must be a shard of latents; got a missing or damaged",
        ),
        (lambda folder: write_shard(folder, 1, *tensors(1)[:2]), "mirrored in .* must have shape .* got none"),
        (lambda folder: write_shard(folder, 1, *tensors(2)), r"latents in .* must have shape \(1, 2, 3, 4\); got \(2"),
    ],
)
def test_damaged_folders(folder, damage, message):
    damage(folder)
    with pytest.raises(ValueError, match=message):
        CachedLatents(folder)
