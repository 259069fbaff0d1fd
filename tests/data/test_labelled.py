"""Images of classes and latents as a generator gets them."""

import warnings

import numpy as np
import PIL.Image
import pytest
import torch

from ipt_fast.data.io import read_image
from ipt_fast.data.labelled import ClassImages, NoisingExamples, centre_square, open_labelled, to_range
from ipt_fast.data.latents import CachedLatents, LatentsInfo, write_index, write_shard


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(pixels).save(path)


def noise(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels)).astype(np.uint8)


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate(("b/1.png", "a/deep/0.png", "b/0.png", "c/x.png")):
        save(tmp_path / "images" / name, noise(8 + number, 10, seed=number))
    return tmp_path / "images"


@pytest.fixture
def latents(tmp_path):
    values = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 2, 3, 3).contiguous()
    write_shard(tmp_path / "latents", 0, values, torch.tensor([0, 1, 1, 0]), -values - 1)
    write_index(tmp_path / "latents", LatentsInfo((2, 3, 3), ("x", "y"), True), [4])
    return tmp_path / "latents"


def test_classes_are_subfolders_in_the_order_of_their_names(folder):
    images = ClassImages(folder, 8)
    assert images.classes == ("a", "b", "c") and images.shape == (3, 8, 8)
    assert [entry.path.relative_to(folder).as_posix() for entry in images.entries] == [
        *("a/deep/0.png", "b/0.png", "b/1.png", "c/x.png")
    ]
    assert images.labels.tolist() == [0, 1, 1, 2]
    value, label = images.example(2)
    assert label == 1 and value.shape == (3, 8, 8) and value.dtype == torch.float32
    pixels = noise(8, 10, seed=0)[:, 1:9]  # whose shorter side is 8 already
    assert torch.equal(value, torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1)
    assert torch.equal(images.example(2, mirrored=True)[0], value.flip(-1))
    assert images.fingerprint()["images"] == 4


def test_images_without_classes_and_gray_ones(tmp_path):
    save(tmp_path / "0.png", noise(8, 8))
    gray = ClassImages(tmp_path, 4, 1)
    assert gray.classes == () and gray.example(0)[1] == 0 and gray.example(0)[0].shape == (1, 4, 4)


def test_classes_by_given_names(folder):
    assert ClassImages(folder, 8, classes=("0", "c", "b", "a")).labels.tolist() == [3, 2, 2, 1]
    with pytest.raises(ValueError, match="classes must hold the names of all subfolders; got none for c in"):
        ClassImages(folder, 8, classes=("a", "b"))


def test_what_is_no_folder_of_classes(folder, tmp_path):
    save(folder / "alone.png", noise(8, 8))
    with pytest.raises(ValueError, match="one folder for each class, or without any; got alone.png beside a"):
        ClassImages(folder, 8)
    with pytest.raises(ValueError, match="data must hold images"):
        (tmp_path / "empty").mkdir()
        ClassImages(tmp_path / "empty", 8)


def test_an_image_that_cannot_be_read_is_skipped(folder):
    (folder / "b" / "0.png").write_bytes(b"no image")
    images = ClassImages(folder, 8)
    images.preload()
    assert list(images.skipped) == [str(folder / "b" / "0.png")]
    assert torch.equal(images.example(1)[0], images.example(2)[0]) and images.example(1)[1] == 1
    for path in folder.rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match="data must hold an image that can be read; got none: cannot read image"):
        ClassImages(folder, 8).example(0)


def test_squares_are_kept_within_the_budget(folder):
    images = ClassImages(folder, 8, memory_budget=4 * 3 * 8 * 8)
    images.preload()
    assert len(images._kept) == 4
    small = ClassImages(folder, 8, memory_budget=2 * 3 * 8 * 8)
    small.preload(2)
    assert small.memory_budget == 3 * 8 * 8 and len(small._kept) == 0
    for number in range(4):
        assert torch.equal(small.example(number)[0], images.example(number)[0])
    assert len(small._kept) == 1


def test_a_square_of_the_right_size_is_cut_out():
    pixels = noise(8, 13)
    assert np.array_equal(centre_square(pixels, 8), pixels[:, 2:10])


@pytest.mark.parametrize("channels", [1, 3])
def test_halving_takes_means(channels):
    pixels = noise(32, 48, channels)
    means = pixels.reshape(8, 4, 12, 4, channels).mean((1, 3))[:, 2:10]
    square = centre_square(pixels, 8)
    assert square.shape == (8, 8, channels) and square.dtype == np.uint8
    assert np.abs(square - means).max() < 2  # Pillow rounds rows and columns, twice


@pytest.mark.parametrize(("height", "width"), [(67, 64), (9, 31), (5, 7)])
def test_a_ramp_stays_one(height, width):
    """Bicubic interpolation and means leave a ramp as it is, but near the borders; its centre stays the centre."""
    pixels = np.broadcast_to(np.arange(width)[None, :, None] * 3, (height, width, 1)).astype(np.uint8)
    square = centre_square(pixels, 8)[:, 2:6].astype(float)
    slope = 3 * min(height, width) / 8
    expected = 3 * (width - 1) / 2 + slope * (np.arange(2, 6) - 3.5)
    assert np.abs(square[:, :, 0] - expected).max() < 0.6 * slope + 1  # an odd number of pixels is cut off-centre


def test_sixteen_bits_are_rounded():
    pixels = np.array([[[0], [128], [129], [65535]]] * 4, np.uint16)
    assert centre_square(pixels, 4)[0, :, 0].tolist() == [0, 0, 1, 255]


def test_range():
    assert to_range(torch.tensor([[0, 255]], dtype=torch.uint8)).tolist() == [[-1.0, 1.0]]
    assert to_range(torch.tensor([[0, 255]], dtype=torch.uint8), mirrored=True).tolist() == [[1.0, -1.0]]


def test_items_are_functions_of_the_seed_and_their_number(folder):
    images = ClassImages(folder, 8)
    first, again, other = (NoisingExamples(images, 1000, seed=seed) for seed in (1, 1, 2))
    for number in (5, 0, 10**9):
        for one, same in zip(first[number], again[number], strict=True):
            assert torch.equal(torch.as_tensor(one), torch.as_tensor(same))
        assert not torch.equal(first[number][3], other[number][3])


def test_what_is_drawn_is_uniform(latents):
    items = [NoisingExamples(CachedLatents(latents), 10, seed=3)[number] for number in range(2000)]
    values = torch.tensor([float(x[0, 0, 0]) for x, *_ in items])
    for value in (-4, -3, -2, -1, 0, 1, 2, 3):  # each of 8 latents, the mirrored ones below 0
        assert 190 < (values == value).sum() < 310
    times = torch.tensor([timestep for _, _, timestep, _ in items])
    assert all(140 < (times == step).sum() < 260 for step in range(10))
    drawn = torch.stack([each[3] for each in items])
    assert abs(drawn.mean()) < 0.02 and abs(drawn.std() - 1) < 0.02
    assert {(abs(int(x[0, 0, 0] + 0.5)), label) for x, label, _, _ in items} == {(0, 0), (1, 1), (2, 1), (3, 0)}
    plain = [NoisingExamples(CachedLatents(latents), 10, flip=False)[number] for number in range(100)]
    assert all(x[0, 0, 0] >= 0 for x, *_ in plain)


def test_folders_are_opened_by_what_they_hold(folder, latents):
    assert isinstance(open_labelled(folder, (3, 8, 8)), ClassImages)
    assert isinstance(open_labelled(latents, (2, 3, 3), ("x", "y")), CachedLatents)
    with pytest.raises(
        ValueError, match=r"data must be latents of shape \(4, 3, 3\), as the model takes; got \(2, 3, 3"
    ):
        open_labelled(latents, (4, 3, 3))
    with pytest.raises(ValueError, match="data must be latents, as `ipt-fast encode` writes them, .* of 4 channels"):
        open_labelled(folder, (4, 8, 8))
    with pytest.raises(ValueError, match="classes must be the same; got y as number 1 in .*latents.*, not z$"):
        open_labelled(latents, (2, 3, 3), ("x", "z"))
    with pytest.raises(ValueError, match="classes must be the same; got none as number 2 in .*, not z$"):
        open_labelled(latents, (2, 3, 3), ("x", "y", "z"))


def test_nothing_warns_of_arrays_that_cannot_be_written(folder):
    with warnings.catch_warnings(action="error"):
        ClassImages(folder, 8).example(0)
    assert read_image(folder / "c" / "x.png").pixels.shape == (11, 10, 3)
