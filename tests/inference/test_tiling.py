"""Tiles cover the image, their weights sum to one, and memory limits are found."""

import itertools
import os
import types

import pytest
import torch

from ipt_fast.tiling import (
    BLENDS,
    available_memory,
    balanced_tile,
    blend_weights,
    control_group_rooms,
    count_tiles,
    tile_limit,
    tile_starts,
)

CASES = [
    (length, tile, overlap)
    for length in (1, 15, 16, 17, 31, 40, 97, 256)
    for tile in (16, 24, 33)
    for overlap in (0, 1, 8)
]


@pytest.mark.parametrize("length, tile, overlap", CASES)
def test_full_tiles_cover_the_axis_with_the_overlap(length, tile, overlap):
    starts = tile_starts(length, tile, overlap)
    assert starts[0] == 0 and len(starts) == count_tiles(length, tile, overlap)
    if length <= tile:
        assert starts == [0]
        return
    assert starts[-1] + tile == length
    assert all(0 < after - before <= tile - overlap for before, after in itertools.pairwise(starts))
    # One tile fewer could not cover it.
    assert (len(starts) - 1) * (tile - overlap) + overlap < length


@pytest.mark.parametrize("blend", BLENDS)
@pytest.mark.parametrize("length, tile, overlap", CASES)
def test_weights_are_positive_and_sum_to_one(length, tile, overlap, blend):
    total = torch.zeros(length)
    for start, weights in zip(
        tile_starts(length, tile, overlap), blend_weights(length, tile, overlap, blend), strict=True
    ):
        assert weights.shape == (min(tile, length),) and (weights > 0).all()
        total[start : start + len(weights)] += weights
    torch.testing.assert_close(total, torch.ones(length))


def test_cosine_fades_over_the_overlap_only():
    first, second = blend_weights(24, 16, 8, "cosine")
    assert (first[:8] == 1).all() and (second[8:] == 1).all()
    assert (first[8:].diff() < 0).all()
    torch.testing.assert_close(first[8:], second[:8].flip(0))
    first, second = blend_weights(24, 16, 8, "average")
    torch.testing.assert_close(first[8:], torch.full((8,), 0.5))


@pytest.mark.parametrize(
    "length, limit, overlap", [(520, 512, 32), (513, 512, 0), (4000, 1000, 32), (100, 512, 32), (3000, 520, 100)]
)
def test_balanced_tile_needs_no_more_tiles_and_less_work(length, limit, overlap):
    tile = balanced_tile(length, limit, overlap)
    assert tile <= limit and count_tiles(length, tile, overlap) == count_tiles(length, limit, overlap)
    assert tile >= min(length, limit) or count_tiles(length, tile - 8, overlap) > count_tiles(length, limit, overlap)
    assert balanced_tile(520, 512, 32) == 280


def test_tile_limit_follows_memory_width_and_batch():
    config = types.SimpleNamespace(width=48)
    assert tile_limit(config, 24_000 * 1000**2) == 1000
    assert tile_limit(config, 24_000 * 1000**2, batch=4) == 500
    assert tile_limit(config, 4_800 * 1000**2, fused=True) == 1000
    assert tile_limit(types.SimpleNamespace(width=12), 24_000 * 1000**2) == 2000
    assert tile_limit(config, 0) == 128
    assert tile_limit(None, 10**12) == 512


def test_available_memory_is_below_what_the_machine_has():
    assert 0 < available_memory(torch.device("cpu")) <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def test_limits_of_control_groups_version_2(tmp_path):
    write(tmp_path / "proc/self", cgroup="0::/user/job")
    write(
        tmp_path / "sys/fs/cgroup/user/job",
        memory__max="max",
        memory__current=5,
        memory__stat="anon 1\ninactive_file 2",
    )
    write(tmp_path / "sys/fs/cgroup/user", memory__max=1000, memory__current=300, memory__stat="inactive_file 100")
    write(tmp_path / "sys/fs/cgroup", memory__stat="inactive_file 100")
    assert control_group_rooms(tmp_path) == [800]


def test_limits_of_control_groups_version_1(tmp_path):
    write(tmp_path / "proc/self", cgroup="3:cpuset:/job\n4:memory:/job")
    write(
        tmp_path / "sys/fs/cgroup/memory",  # inside a container the group's own files stand at the top
        memory__limit_in_bytes=1000,
        memory__usage_in_bytes=1100,
        memory__stat="inactive_file 1\ntotal_inactive_file 50",
    )
    assert control_group_rooms(tmp_path) == [0]
    assert control_group_rooms(tmp_path / "nothing") == []
