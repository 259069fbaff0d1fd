"""Images of any size through IPT, which takes one size: the released procedure, the paper's, and a blended one."""

import numpy as np
import PIL.Image
import pytest
import torch

import ipt_fast
from ipt_fast import inference
from ipt_fast.inference import Restorer, restore
from ipt_fast.tiling import procedure_tiles
from tests.oracles.public import public_module

TASKS = ("sr_x2", "sr_x3", "sr_x4", "derain")
SIZES = [(48, 48), (59, 48), (48, 95), (60, 60), (60, 71), (73, 100), (97, 84)]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return ipt_fast.create_model("ipt", tasks=TASKS, layers=1, features=4, heads=3).eval()


@pytest.mark.parametrize("size", SIZES)
def test_official_is_the_released_procedure(model, size):
    published = public_module("spandrel.architectures.IPT.__arch.ipt").IPT
    procedure = public_module("spandrel.architectures.IPT.__arch.model").Model
    other = published(scale=[2, 3, 4, 1], num_layers=1, num_queries=4, n_feats=4, num_heads=3).eval()
    other.load_state_dict(model.state_dict())
    images = torch.rand(2, 3, *size)
    for index, task in enumerate(TASKS):
        if model.scale(task) == 4 and size[0] * size[1] > 4000:
            continue
        got = restore(images, model, task=task, tile="official", dtype="float32")
        with torch.no_grad():
            for image, each in zip(images, got, strict=True):
                expected = procedure(other).forward(255 * image[None], index)[0] / 255
                assert (each - expected).abs().max() < 1e-5 * expected.abs().max()


def test_the_papers_tiles():
    """196 tiles of an image of 512 x 512 (section 4), against 1600 and a corner by the released procedure."""
    assert len(procedure_tiles("paper", 512, 48)) ** 2 == 196
    assert len(procedure_tiles("official", 512, 48)) ** 2 == 1600
    for length in (48, 49, 86, 87, 200):
        starts = [start for start, _ in procedure_tiles("paper", length, 48)]
        assert starts[0] == 0 and starts[-1] == length - 48
        assert all(b - a <= 38 for a, b in zip(starts, starts[1:], strict=False))


@pytest.mark.parametrize("procedure", ["blend", "paper", "official"])
@pytest.mark.parametrize("scale", [1, 2, 3])
@pytest.mark.parametrize("length", [48, 50, 59, 60, 97, 130])
def test_weights_sum_to_one(procedure, scale, length):
    total = torch.zeros(length * scale)
    for start, weights in procedure_tiles(procedure, length, 48, scale):
        assert len(weights) == 48 * scale and weights.min() >= 0
        total[start * scale : (start + 48) * scale] += weights
    torch.testing.assert_close(total, torch.ones_like(total))


class Identity(torch.nn.Module):
    """An IPT that knows what to do: its tiles, magnified by repetition."""

    def __init__(self, model):
        super().__init__()
        self.config, self.scale = model.config, model.scale

    def forward(self, x, task):
        assert x.shape[1:] == (3, 48, 48) and x.max() > 200
        return x.repeat_interleave(self.scale(task), 2).repeat_interleave(self.scale(task), 3)


@pytest.mark.parametrize("tile", ["auto", "blend", "paper", "official"])
@pytest.mark.parametrize("size", [(1, 1), (20, 30), (48, 70), (131, 99)])
def test_any_size_and_scale(model, tile, size):
    image = torch.rand(3, 3, *size)
    image[:, :, 0, 0] = 1
    for task in TASKS:
        scale = model.scale(task)
        got = restore(image, Identity(model), task=task, tile=tile)
        expected = image.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
        torch.testing.assert_close(got, expected)


def test_tiles_of_several_images_share_batches(model, monkeypatch):
    images = torch.rand(3, 3, 90, 60)
    together = restore(images, model, task=1, dtype="float32")
    monkeypatch.setattr(inference, "TILES_AT_ONCE", 1)
    for image, expected in zip(images, together, strict=True):
        torch.testing.assert_close(restore(image[None], model, task=1, dtype="float32")[0], expected)
    assert not torch.allclose(together, restore(images, model, task=1, tile="paper", dtype="float32"))
    same = restore(images, model, task=1, blend="average", dtype="float32")
    torch.testing.assert_close(same, restore(images, model, task=1, tile="paper", dtype="float32"))


class Small(Identity):
    """One that memory allows so many tiles."""

    most = 5

    def forward(self, x, task):
        if len(x) > self.most:
            raise torch.OutOfMemoryError("too many tiles")
        return super().forward(x, task)


@pytest.mark.parametrize("tile", ["blend", "official"])
def test_memory_runs_out(model, tile):
    images = torch.rand(7, 3, 60, 50)
    images[:, :, 0, 0] = 1
    with pytest.warns(UserWarning, match="out of memory, trying 4 tiles at once"):
        got = restore(images, Small(model), task="derain", tile=tile, dtype="float32")
    torch.testing.assert_close(got, images)
    tight = Small(model)
    tight.most = 0
    with pytest.warns(UserWarning), pytest.raises(torch.OutOfMemoryError):
        restore(images, tight, task="derain", dtype="float32")


def test_compiled_models_and_empty_batches(model):
    images = torch.rand(1, 3, 50, 48)
    compiled = torch.compile(model, backend="eager")
    expected = restore(images, model, task="derain", dtype="float32")
    torch.testing.assert_close(restore(images, compiled, task="derain", dtype="float32"), expected)
    assert restore(images[:0], model, task="sr_x2").shape == (0, 3, 100, 96)


def test_self_ensemble(model):
    image = torch.rand(1, 3, 48, 48)
    views = []
    for turns in range(4):
        for flip in (False, True):
            view = torch.rot90(image, turns, (2, 3))
            output = restore(view.flip(3) if flip else view, model, task="sr_x2", dtype="float32")
            views.append(torch.rot90(output.flip(3) if flip else output, -turns, (2, 3)))
    got = restore(image, model, task="sr_x2", self_ensemble=True, dtype="float32")
    torch.testing.assert_close(got, torch.stack(views).mean(0))


def test_kinds_of_images(model):
    restorer = Restorer(model, task="sr_x2")
    gray = np.random.default_rng(0).integers(0, 256, (20, 30), dtype=np.uint8)
    assert restorer(gray).shape == (40, 60, 1)[: restorer(gray).ndim] and restorer(gray).dtype == np.uint8
    with_alpha = PIL.Image.fromarray(np.dstack([gray] * 3 + [np.full_like(gray, 200)]))
    larger = restorer(with_alpha)
    assert larger.size == (60, 40) and larger.mode == "RGBA"
    assert np.asarray(larger)[:, :, 3].min() == np.asarray(larger)[:, :, 3].max() == 200


def test_bad_arguments(model):
    image = torch.rand(1, 3, 50, 50)
    for tile in (None, 48, "whole"):
        with pytest.raises(ValueError, match="tile must be auto, blend, paper, official for IPT, whose input has 48"):
            restore(image, model, task=0, tile=tile)
    with pytest.raises(ValueError, match='blend must be "cosine" where tile is "blend"'):
        restore(image, model, task=0, tile="blend", blend="average")
    with pytest.raises(ValueError, match="overlap must be None for IPT"):
        restore(image, model, task=0, overlap=10)
    for task in (None, "dehaze", 4):
        with pytest.raises(
            ValueError, match="task must be one of sr_x2, sr_x3, sr_x4, derain( or a number below 4)?; got"
        ):
            restore(image, model, task=task)
    with pytest.raises(ValueError, match="tile must be"):
        restore(image, ipt_fast.create_model("ipt_v2_tiny"), tile="official")
