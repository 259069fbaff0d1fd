"""Pairs in folders and shards, mixtures of sources and tasks, and bad files: named, skipped and counted."""

import io
import pickle
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from ipt_fast.data.dataset import Patches
from ipt_fast.data.io import Image as FileImage
from ipt_fast.data.io import write_image
from ipt_fast.data.resize import imresize
from ipt_fast.data.stream import ImageStream, PairStream, TrainingData, open_source


def places(height, width, scale=1):
    """Every pixel says where it is, in units of ``scale`` pixels."""
    rows, columns = np.mgrid[: height * scale, : width * scale] // scale
    return np.stack([rows, columns, 0 * rows], -1).astype(np.uint8)


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def paired(tmp_path):
    """Three pairs, one with another suffix; what the blue of an input says is its number."""
    for number, (name, partner) in enumerate((("a.png", "a.png"), ("sub/b.png", "sub/b.bmp"), ("c.png", "c.png"))):
        pixels = places(30, 34 + number)
        save(tmp_path / "target" / partner, pixels)
        save(tmp_path / "input" / name, pixels + np.array([0, 0, 10 + number], np.uint8))
    return tmp_path


def add(archive, name, pixels):
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    member = tarfile.TarInfo(name)
    member.size = len(content.getvalue())
    archive.addfile(member, io.BytesIO(content.getvalue()))


def equal(one, other):
    return all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(one, other, strict=True))


def test_both_images_are_cropped_and_turned_alike(paired):
    data = TrainingData([PairStream([paired / "input"], paired / "target")])
    patches, numbers, corners = Patches(data, 16, {"derain": 1.0}), set(), set()
    for number in range(100):
        degraded, clean = (255 * each for each in patches[number])
        assert degraded.shape == clean.shape == (3, 16, 16)
        assert torch.allclose(degraded[:2], clean[:2]) and torch.all(clean[2] == 0)
        numbers.add(round(degraded[2, 0, 0].item()))
        down, right = clean[0, -1, 0] - clean[0, 0, 0], clean[0, 0, -1] - clean[0, 0, 0]
        across = clean[1, -1, 0] - clean[1, 0, 0] + clean[1, 0, -1] - clean[1, 0, 0]
        corners.add((down.sign().item(), right.sign().item(), across.sign().item()))
    assert numbers == {10, 11, 12} and len(corners) == 8


def test_targets_that_are_larger(tmp_path):
    save(tmp_path / "input" / "a.png", places(20, 24))
    save(tmp_path / "target" / "a.png", places(20, 24, scale=3))
    data = TrainingData([PairStream([tmp_path / "input"], tmp_path / "target", scale=3)])
    patches = Patches(data, 12, {"sr_x3": 1.0})
    for number in range(30):
        small, large = patches[number]
        assert large.shape == (3, 36, 36) and torch.equal(small.repeat_interleave(3, 1).repeat_interleave(3, 2), large)


def test_two_views(tmp_path):
    for folder, blue in (("left", 1), ("right", 2), ("target", 0)):
        save(tmp_path / folder / "a.png", places(20, 24) + np.array([0, 0, blue], np.uint8))
    stream = open_source([tmp_path / "left", tmp_path / "right"], tmp_path / "target", (3, 3, 3), 1, 1, 10**6)
    views, clean = Patches(TrainingData([stream]), 8, {"dual_pixel_deblur": 1.0})[3]
    assert views.shape == (6, 8, 8) and torch.equal(views[:2], views[3:5]) and torch.equal(views[:2], clean[:2])
    assert (255 * views[[2, 5], 0, 0]).round().tolist() == [1, 2]


@pytest.mark.parametrize(("folders", "channels"), [(2, (3, 3)), (1, (3, 3, 3))])
def test_folders_for_another_number_of_views(paired, folders, channels):
    wanted = "2 folders" if folders == 1 else "one folder"
    with pytest.raises(ValueError, match=f"data must be {wanted} of inputs for each target; got "):
        PairStream([paired / "input"] * folders, paired / "target", channels)


@pytest.mark.parametrize("views", [1, 2])
def test_shards_of_pairs(tmp_path, views):
    roles = ["input", "target"] if views == 1 else ["left", "right", "target"]
    with tarfile.open(tmp_path / "pairs.tar", "w") as archive:
        for key in ("0001", "0002"):
            for place, role in enumerate(roles):
                add(archive, f"{key}.{role}.png", places(20, 24) + np.array([0, 0, place], np.uint8))
        add(archive, "0003.target.png", places(20, 24))
        add(archive, "0004.input.png", places(20, 24))
    stream = open_source([tmp_path], None, (3,) * (views + 1), 1, 1, 10**6)
    assert isinstance(stream, PairStream) and len(stream) == 2
    assert [image[2].unique().item() for image in stream[1]] == list(range(views + 1))
    assert len(stream.skipped) == 2 and any("0003: it has no" in f"{k}: {w}" for k, w in stream.skipped.items())
    assert stream.fingerprint()["images"] == 2 * (views + 1)


def test_pairs_of_sixteen_bits(tmp_path):
    pytest.importorskip("imagecodecs")
    deep = np.random.default_rng(0).integers(0, 65536, (16, 16, 3), dtype=np.uint16)
    for folder, pixels in (("input", deep // 2), ("target", deep)):
        (tmp_path / folder).mkdir()
        write_image(tmp_path / folder / "a.png", FileImage(pixels))
    data = TrainingData([PairStream([tmp_path / "input"], tmp_path / "target")])
    degraded, clean = Patches(data, 16, {"derain": 1})[0]
    assert set((clean * 65535).round().int().flatten().tolist()) == set(deep.flatten().tolist())
    torch.testing.assert_close((degraded * 65535).round(), ((clean * 65535).round() / 2).floor())


def bad_pairs(folder):
    """One bad file of each kind beside the three good pairs; {name: part of the reason}."""
    good = places(30, 34)
    save(folder / "input" / "small.png", good[:10])
    save(folder / "target" / "small.png", good[:10])
    save(folder / "input" / "size.png", good)
    save(folder / "target" / "size.png", good[:, :30])
    save(folder / "input" / "alone.png", good)
    save(folder / "target" / "nobody.png", good)
    for name in ("empty.png", "text.png", "broken.png"):
        save(folder / "input" / name, good)
        save(folder / "target" / name, good)
    (folder / "input" / "empty.png").write_bytes(b"")
    (folder / "target" / "text.png").write_bytes(b"no image")
    path = folder / "input" / "broken.png"
    path.write_bytes(path.read_bytes()[:-200])  # its header is whole
    Image.fromarray(good).convert("CMYK").save(folder / "input" / "cmyk.jpg")
    save(folder / "target" / "cmyk.png", good)
    return {
        "small.png": "34 x 10 pixels, and a patch takes 16",
        "size.png": "sizes must be",
        "alone.png": "it has no target of its name",
        "nobody.png": "no input has its name",
        "empty.png": "cannot read image",
        "text.png": "cannot read image",
        "broken.png": "cannot read image",
        "cmyk.jpg": "got CMYK",
    }


@pytest.mark.parametrize("preloaded", [True, False])
def test_bad_files_are_named_skipped_and_counted(paired, preloaded):
    expected = bad_pairs(paired)
    data = TrainingData([PairStream([paired / "input"], paired / "target", memory_budget=10**8 * preloaded)])
    patches = Patches(data, 16, {"derain": 1.0})
    data.streams[0].preload()
    for number in range(40):
        blue = 255 * patches[number][0][2, 0, 0]
        assert round(blue.item()) in (10, 11, 12)
    found = data.skipped
    assert len(found) == len(expected)
    for name, reason in expected.items():
        assert any(name in key or name in why for key, why in found.items() if reason in why), (name, found)
    with pytest.warns(UserWarning, match="skipped 8 of the images: ") as warned:
        assert data.warn_of_skipped() == 8
    message = str(warned[0].message)
    assert all(name in message for name in expected) and message.count("broken.png") == 1
    assert data.warn_of_skipped() == 8  # and not named again: the tests' warnings would be errors


def test_what_is_skipped_depends_on_no_worker(paired):
    bad_pairs(paired)

    def batches(workers):
        data = TrainingData([PairStream([paired / "input"], paired / "target", memory_budget=0)])
        patches = Patches(data, 16, {"derain": 1.0}, seed=5)
        found = list(DataLoader(patches, 4, sampler=range(48), num_workers=workers))
        assert any("broken.png" in why for why in data.skipped.values())  # a worker found it, this process names it
        return found

    alone, helped, many = batches(0), batches(1), batches(2)
    for one, other, third in zip(alone, helped, many, strict=True):
        assert equal(one, other) and equal(one, third)


def test_no_usable_image_is_an_error(tmp_path):
    said = "data must hold an image that can be used; got none: cannot read image .*a.png"
    path = tmp_path / "images" / "a.png"
    save(path, np.random.default_rng(0).integers(0, 256, (30, 34, 3), dtype=np.uint8))
    path.write_bytes(path.read_bytes()[:-200])
    patches = Patches(TrainingData([ImageStream(tmp_path / "images")]), 16, {"denoise": 1.0})
    with pytest.raises(ValueError, match=said):
        patches[0]
    path.write_bytes(b"text")
    with pytest.raises(ValueError, match=said):
        Patches(TrainingData([ImageStream(tmp_path / "images")]), 16, {"denoise": 1.0})
    for inputs, target in (([tmp_path / "images"], tmp_path / "gone"), ([tmp_path / "gone"], tmp_path / "images")):
        with pytest.raises(ValueError, match="folder must exist; got .*gone"):
            PairStream(inputs, target)
    save(tmp_path / "others" / "b.png", places(30, 34))
    with pytest.raises(ValueError, match="data must hold pairs of images of the same names; got none in .*others"):
        PairStream([tmp_path / "others"], tmp_path / "images")


def test_a_mixture_of_tasks_and_sources(paired, tmp_path):
    save(tmp_path / "clean" / "x.png", places(40, 40) // 8 * 8 + 100)
    data = TrainingData([ImageStream(tmp_path / "clean"), PairStream([paired / "input"], paired / "target")], [3, 1])
    patches = Patches(data, 16, {"denoise50": 1.0, "sr_x1": 3.0}, seed=1)
    kinds = {"pair": 0, "noisy": 0, "clean": 0}
    for number in range(400):
        degraded, clean = patches[number]
        assert equal(patches[number], (degraded, clean))
        noisy = not torch.allclose(degraded, clean, atol=0.02)
        kinds["pair" if clean[2].max() == 0 else "noisy" if noisy else "clean"] += 1
    assert abs(kinds["pair"] - 100) < 30 and abs(kinds["noisy"] - 75) < 30 and abs(kinds["clean"] - 225) < 40
    by_size = TrainingData(data.streams)
    pairs = sum(Patches(by_size, 16, {"denoise": 1.0})[n][1][2].max().item() == 0 for n in range(200))
    assert 120 < pairs < 180  # three of four images


def test_shrunk_photos(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (41, 52, 3), dtype=np.uint8)
    save(tmp_path / "a.png", pixels)
    stream = ImageStream(tmp_path, shrinking=2)
    expected = imresize(torch.from_numpy(pixels).permute(2, 0, 1).double(), 1 / 2).round().clamp(0, 255)
    assert stream.sizes == [(21, 26)] and torch.equal(stream[0].double(), expected)
    with pytest.raises(ValueError, match="shrink must be 1 for pairs; got 2"):
        open_source([tmp_path], tmp_path, (3, 3), 1, 2, 0)
    with pytest.raises(ValueError, match="patch_size must be at most 21 for derain, by the largest image; got 24"):
        Patches(TrainingData([stream]), 24, {"derain": 1.0})


def test_a_dataset_can_be_sent_to_a_process_that_is_not_forked(paired):
    stream = PairStream([paired / "input"], paired / "target")
    stream.preload()
    patches = Patches(TrainingData([stream]), 16, {"derain": 1.0})
    sent = pickle.loads(pickle.dumps(patches))
    assert stream._kept and not sent.data.streams[0]._kept  # only what is to be decoded is sent
    assert all(equal(patches[number], sent[number]) for number in range(8))


def test_half_of_the_clean_patches_are_enlarged(tmp_path):
    """A ramp rises by 1 a pixel; enlarged it rises more slowly, and never by less than the factor allows."""
    ramp = np.broadcast_to(np.arange(200, dtype=np.uint8)[:, None, None], (200, 200, 3))
    save(tmp_path / "ramp.png", np.ascontiguousarray(ramp))
    data = TrainingData([ImageStream(tmp_path)])

    def slopes(**settings):
        patches = Patches(data, 48, {"denoise0": 1.0}, **settings)
        cleans = [patches[number][1] for number in range(64)]
        # Away from the borders, where enlarging repeats the last pixels.
        return [255 * max((clean[0, 40, 24] - clean[0, 8, 24]).abs(), (clean[0, 24, 40] - clean[0, 24, 8]).abs()) / 32
                for clean in cleans]  # fmt: skip

    assert all(slope == pytest.approx(1, abs=1e-3) for slope in slopes())
    enlarged = slopes(enlarge=2.0)
    assert 20 < sum(slope < 0.99 for slope in enlarged) < 44
    assert 0.48 < min(enlarged) < 0.6 and max(enlarged) == pytest.approx(1, abs=1e-3)
