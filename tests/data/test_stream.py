"""Images from folders and tar shards, and the patches of several tasks that are drawn from them."""

import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from ipt_fast.data.dataset import TaskPatches
from ipt_fast.data.io import Image as FileImage
from ipt_fast.data.io import read_image, write_image
from ipt_fast.data.resize import imresize
from ipt_fast.data.stream import ImageStream

TASKS = {"sr_x2": 2, "derain": 1, "denoise30": 1}


def pixels(seed, size=(40, 44)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Two files, one of them gray, and two shards as WebDataset writes them."""
    (tmp_path / "sub").mkdir()
    Image.fromarray(pixels(0)).save(tmp_path / "a.png")
    Image.fromarray(pixels(1)[:, :, 0]).save(tmp_path / "sub/b.png")
    for shard in range(2):
        with tarfile.open(tmp_path / f"shard-{shard:03}.tar", "w") as archive:
            for i in range(2):
                data = io.BytesIO()
                Image.fromarray(pixels(10 + 2 * shard + i)).save(data, "PNG")
                for suffix, content in (("cls", b"7"), ("png", data.getvalue())):
                    member = tarfile.TarInfo(f"{i:05}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return tmp_path


def test_files_and_shards(folder):
    stream = ImageStream(folder)
    assert len(stream) == 6
    expected = [pixels(0), np.repeat(pixels(1)[:, :, :1], 3, 2), *(pixels(10 + i) for i in range(4))]
    for index in (5, 0, 3, 1, 2, 4, 0):  # in any order, and again
        assert np.array_equal(stream[index].permute(1, 2, 0).numpy(), expected[index])
    one = ImageStream(folder / "shard-001.tar", memory_budget=0)
    assert len(one) == 2 and torch.equal(one[1], stream[5]) and not one._kept
    few = ImageStream(folder, memory_budget=2 * 40 * 44 * 3)
    assert all(torch.equal(few[i], stream[i]) for i in range(6)) and len(few._kept) == 2


def test_bad_sources(tmp_path, folder):
    with pytest.raises(ValueError, match="data must be a folder or a .tar file; got"):
        ImageStream(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="data must hold images"):
        ImageStream(tmp_path / "empty")
    (tmp_path / "empty/broken.tar").write_bytes(b"no archive" * 100)
    with pytest.raises(ValueError, match=r"cannot read the shard .*broken.tar"):
        ImageStream(tmp_path / "empty")
    (folder / "sub/b.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"cannot read image .*b.png"):
        ImageStream(folder / "sub")[0]


def test_upright(tmp_path):
    for orientation in range(1, 9):  # in a stream as data/io reads it
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(pixels(0)).save(tmp_path / f"{orientation}.png", exif=exif)
    stream = ImageStream(tmp_path)
    for index in range(8):
        expected = read_image(tmp_path / f"{index + 1}.png").pixels
        assert np.array_equal(stream[index].permute(1, 2, 0).numpy(), expected)
    assert np.array_equal(stream[5].permute(1, 2, 0).numpy(), np.rot90(pixels(0), -1))


def save_pages(path):
    Image.fromarray(pixels(0)).save(path, save_all=True, append_images=[Image.fromarray(pixels(1))])


def save_cmyk(path):
    Image.fromarray(pixels(0)).convert("CMYK").save(path)


@pytest.mark.parametrize("in_shard", [False, True])
@pytest.mark.parametrize(
    ("name", "save", "reason"),
    [
        ("a.tif", save_pages, "it must have one frame or page; got 2"),
        ("a.png", save_pages, "it must have one frame or page; got 2"),
        ("a.webp", save_pages, "it must have one frame or page; got 2"),
        ("a.jpg", save_cmyk, "its mode must be .*; got CMYK"),
        ("a.tif", save_cmyk, "its colours must be .*; got CMYK"),
    ],
)
def test_wrong_kinds_are_refused(tmp_path, name, save, reason, in_shard):
    path = tmp_path / name
    save(path)
    place = name
    if in_shard:
        with tarfile.open(tmp_path / "shard.tar", "w") as archive:
            archive.add(path, name)
        path.unlink()
        place = r"shard.tar, at byte \d+"
    with pytest.raises(ValueError, match=f"cannot read image .*{place}: {reason}"):
        ImageStream(tmp_path)[0]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA"])
def test_ordinary_kinds_become_rgb(tmp_path, mode):
    image = Image.fromarray(pixels(0)).convert("L" if mode == "LA" else "RGB").convert(mode.replace("PA", "P"))
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.fromarray(pixels(1)[:, :, 0]))
    suffix, options = ("png", {"transparency": 3}) if mode == "PA" else ("tif", {})
    image.save(tmp_path / f"a.{suffix}", **options)
    expected = np.array(Image.open(tmp_path / f"a.{suffix}").convert("RGB"))  # Pillow drops alpha here
    got = ImageStream(tmp_path)[0]
    assert got.dtype == torch.uint8 and got.stride() == (1, 3 * 44, 3)
    assert np.array_equal(got.permute(1, 2, 0).numpy(), expected)


def test_patches_are_of_one_task_a_batch(folder):
    patches = TaskPatches(ImageStream(folder), 16, TASKS, batch_size=4, seed=3)
    seen = set()
    for batch in range(12):
        degraded, clean, task = zip(*(patches[4 * batch + i] for i in range(4)), strict=True)
        assert len(set(task)) == 1
        name = list(TASKS)[task[0]]
        seen.add(name)
        size = 16 * TASKS[name]
        for x, y in zip(degraded, clean, strict=True):
            assert x.shape == (3, 16, 16) and y.shape == (3, size, size) and 0 <= y.min() <= y.max() <= 1
            if name == "sr_x2":
                assert torch.equal(x, imresize(y, 0.5).clamp(0, 1))
    assert seen == set(TASKS)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_in_a_shard(tmp_path, suffix):
    pytest.importorskip("imagecodecs")
    deep = np.random.default_rng(0).integers(0, 65536, (9, 8, 3), dtype=np.uint16)
    write_image(tmp_path / f"a.{suffix}", FileImage(deep))
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        archive.add(tmp_path / f"a.{suffix}", f"a.{suffix}")
    stream = ImageStream(tmp_path / "shard.tar")
    assert stream.sizes == [(9, 8)] and np.array_equal(stream[0].permute(1, 2, 0).numpy(), deep)


def test_a_patch_depends_on_seed_and_number_alone(folder):
    def draw(number, seed=0):
        return TaskPatches(ImageStream(folder), 16, TASKS, batch_size=4, seed=seed)[number]

    for number in (0, 5, 10**9):
        assert all(
            torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(draw(number), draw(number), strict=True)
        )
    assert not torch.equal(draw(0)[1], draw(1)[1]) and not torch.equal(draw(0)[1], draw(0, seed=1)[1])
    patches = TaskPatches(ImageStream(folder), 16, TASKS, batch_size=4)
    alone, helped = (list(DataLoader(patches, 4, sampler=range(16), num_workers=n)) for n in (0, 2))
    for one, other in zip(alone, helped, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_images_that_are_too_small_are_passed_over(folder):
    Image.fromarray(pixels(0, (20, 20))).save(folder / "a.png")
    patches = TaskPatches(ImageStream(folder), 20, {"sr_x2": 2}, batch_size=1)
    assert all(patches[i][1].shape == (3, 40, 40) for i in range(20))
    assert "20 x 20 pixels, and a patch takes 40" in patches.data.skipped[str(folder / "a.png")]
    with pytest.raises(ValueError, match="patch_size must be at most 20 for sr_x2, by the largest image; got 45"):
        TaskPatches(ImageStream(folder), 45, {"sr_x2": 2}, batch_size=1)
