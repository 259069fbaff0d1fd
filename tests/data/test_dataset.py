import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from ipt_fast.data import io
from ipt_fast.data.dataset import ImageFolder, NoisyPatches, apply_symmetry


def coordinates(height: int, width: int) -> np.ndarray:
    """An RGB image in which every pixel says where it is."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows, columns, rows * 0 + 7], axis=-1).astype(np.uint8)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "deeper").mkdir()
    Image.fromarray(coordinates(40, 50)).save(tmp_path / "a.png")
    Image.fromarray(coordinates(60, 30)).save(tmp_path / "deeper" / "b.BMP")
    (tmp_path / "notes.txt").write_text("not an image")
    return tmp_path


def test_folder_reads_subfolders_in_order(folder):
    images = ImageFolder(folder)
    assert len(images) == 2 and images.sizes == [(40, 50), (60, 30)]
    assert torch.equal(images[1], torch.from_numpy(coordinates(60, 30)).permute(2, 0, 1))


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "bmp", "tif", "tiff", "webp"])
def test_formats(tmp_path, suffix):
    Image.new("RGB", (9, 5), (200, 100, 50)).save(tmp_path / f"x.{suffix}")
    (image,) = ImageFolder(tmp_path)
    assert image.dtype == torch.uint8 and image.shape == (3, 5, 9)
    assert (image.float().mean((1, 2)) - torch.tensor([200.0, 100, 50])).abs().max() < 5


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1"])
def test_other_eight_bit_modes_become_rgb(tmp_path, mode):
    Image.new(mode, (4, 4), 1).save(tmp_path / "x.png")
    assert ImageFolder(tmp_path)[0].shape == (3, 4, 4)


def test_gray(folder):
    images = ImageFolder(folder, channels=1)
    expected = np.asarray(Image.fromarray(coordinates(40, 50)).convert("L"))
    assert torch.equal(images[0], torch.from_numpy(expected.copy())[None])


def test_images_over_the_budget_are_read_on_demand(folder):
    eager, lazy = ImageFolder(folder), ImageFolder(folder, memory_budget=100)
    (folder / "a.png").write_bytes(b"gone bad")
    assert eager[0].shape == (3, 40, 50) and torch.equal(eager[1], lazy[1])
    with pytest.raises(ValueError, match="a.png"):
        lazy[0]


def test_an_image_that_changes_is_named(folder):
    lazy = ImageFolder(folder, memory_budget=0)
    Image.fromarray(coordinates(10, 10)).save(folder / "a.png")
    with pytest.raises(ValueError, match="images must stay as they are; got .*a.png of another size than at the start"):
        lazy[0]


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(ValueError, match="folder must exist; got .*nowhere"):
        ImageFolder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="data must hold images"):
        ImageFolder(tmp_path)


def test_bad_channels(folder):
    with pytest.raises(ValueError, match="channels must be 1 or 3; got 6"):
        ImageFolder(folder, channels=6)


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tif", "webp"])
@pytest.mark.parametrize("kept", [0.6, 0.01, 0])
def test_truncated_files_are_named(tmp_path, suffix, kept):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"broken.{suffix}"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with pytest.raises(ValueError, match=f"broken.{suffix}"):
        ImageFolder(tmp_path)


@pytest.mark.parametrize("budget", [0, 2**30])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_keep_their_precision(tmp_path, suffix, channels, budget):
    pytest.importorskip("imagecodecs")
    pixels = np.random.default_rng(0).integers(0, 65536, (8, 9, channels), dtype=np.uint16)
    io.write_image(tmp_path / f"deep.{suffix}", io.Image(pixels))
    images = ImageFolder(tmp_path, channels, memory_budget=budget)
    assert images[0].dtype == torch.uint16 and np.array_equal(images[0].permute(1, 2, 0).numpy(), pixels)
    _, clean = NoisyPatches(images, 8, (0, 0))[0]
    values = set((pixels.astype(np.float32) / 65535).flatten().tolist())
    assert clean.dtype == torch.float32 and set(clean.flatten().tolist()) <= values
    other = ImageFolder(tmp_path, 4 - channels)[0].permute(1, 2, 0).numpy()
    luma = pixels.astype(float) @ ([0.299, 0.587, 0.114] if channels == 3 else [1.0])
    assert other.dtype == np.uint16 and np.abs(other - luma[..., None]).max() <= 1


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1"])
@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_those_of_pillow(tmp_path, channels, mode):
    source = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 4), dtype=np.uint8)).convert(mode)
    source.save(tmp_path / "x.png")
    expected = np.atleast_3d(np.array(source.convert("RGB" if channels == 3 else "L")))
    assert torch.equal(ImageFolder(tmp_path, channels)[0], torch.from_numpy(expected).permute(2, 0, 1))


def test_images_come_upright(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # turned by 90 degrees clockwise when shown
    Image.fromarray(coordinates(5, 9)).save(tmp_path / "x.png", exif=exif)
    (image,) = ImageFolder(tmp_path)
    assert torch.equal(image, torch.from_numpy(np.rot90(coordinates(5, 9), -1).copy()).permute(2, 0, 1))


def test_hidden_files_and_folders_are_left_out(folder):
    (folder / "._a.png").write_bytes(b"of another system")
    (folder / "album.png").mkdir()
    assert [path.name for path in ImageFolder(folder).paths] == ["a.png", "b.BMP"]


def test_item_is_a_pure_function_of_seed_and_number(folder):
    images = ImageFolder(folder)
    first, second = (NoisyPatches(images, 16, (5, 50), seed=3) for _ in range(2))
    forwards = [first[number] for number in range(20)]
    backwards = [second[number] for number in reversed(range(20))][::-1]
    for one, other in zip(forwards, backwards, strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    other_seed = NoisyPatches(images, 16, (5, 50), seed=4)
    assert not any(torch.equal(first[number][0], other_seed[number][0]) for number in range(20))
    assert not any(torch.equal(forwards[0][0], pair[0]) for pair in forwards[1:])


def test_clean_patches_are_crops_in_all_orientations(folder):
    images = ImageFolder(folder)
    patches = NoisyPatches(images, 16, (5, 50))
    orientations, tops = set(), set()
    for number in range(200):
        noisy, clean = patches[number]
        assert clean.shape == noisy.shape == (3, 16, 16) and clean.dtype == noisy.dtype == torch.float32
        rows, columns, constant = (clean * 255).round().int()
        assert (constant == 7).all()
        top, left = int(rows.min()), int(columns.min())
        crop = torch.from_numpy(coordinates(60, 50)).permute(2, 0, 1)[:, top : top + 16, left : left + 16]
        matching = [index for index in range(8) if torch.equal(apply_symmetry(crop, index).float() / 255, clean)]
        assert len(matching) == 1
        orientations.update(matching)
        tops.add(top)
    assert orientations == set(range(8))
    assert min(tops) == 0 and max(tops) == 44  # the last row of the taller image is reached


def test_noise_levels_cover_the_range(folder):
    patches = NoisyPatches(ImageFolder(folder), 24, (10, 40))
    levels = [(noisy - clean).std().item() * 255 for noisy, clean in (patches[number] for number in range(200))]
    assert 9 < min(levels) < 13 and 37 < max(levels) < 42


def test_patch_larger_than_an_image(folder):
    NoisyPatches(ImageFolder(folder), 30, (5, 50))
    with pytest.raises(ValueError, match=r"patch_size must be .*; got 31 and .*b.BMP of 60x30"):
        NoisyPatches(ImageFolder(folder), 31, (5, 50))
