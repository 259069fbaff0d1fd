"""restore(): the same kind, dtype and range back; tiles, ensembles, precision and memory."""

import copy
import warnings

import numpy as np
import PIL.Image
import pytest
import torch
from torch import nn

import ipt_fast
from ipt_fast import _extension, inference
from ipt_fast.inference import Restorer, restore
from ipt_fast.models.contract import Contract


class Double(nn.Module):
    def forward(self, x):
        return 2 * x


class Blur(nn.Module):
    """A fixed 5 x 5 convolution with zero padding, different for every direction."""

    def __init__(self, channels=3):
        super().__init__()
        weight = torch.arange(25.0).reshape(1, 1, 5, 5).repeat(channels, 1, 1, 1) / 300
        self.weight = nn.Parameter(weight)

    def forward(self, x):
        return nn.functional.conv2d(x, self.weight, padding=2, groups=self.weight.shape[0])


def ramp(dtype, shape=(9, 13, 3)):
    values = np.random.default_rng(0).random(shape)
    top = np.iinfo(dtype).max if np.issubdtype(dtype, np.integer) else 1
    return (values * top).astype(dtype)


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return ipt_fast.create_model("ipt_v2_tiny").eval()


# --- kinds and dtypes


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(9, 13), (9, 13, 1), (9, 13, 3), (1, 1), (1, 1, 3), (9, 13, 6)])
@pytest.mark.parametrize("tile", [None, 16])
def test_arrays_come_back_as_they_are(shape, dtype, tile):
    image = ramp(dtype, shape)
    output = restore(image, nn.Identity(), tile=tile)
    assert output.dtype == dtype and output.shape == shape
    if np.issubdtype(dtype, np.integer):
        np.testing.assert_array_equal(output, image)
    else:
        np.testing.assert_allclose(output, image, rtol=1e-6)


def test_all_sixteen_bit_values_survive():
    image = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    np.testing.assert_array_equal(restore(image, nn.Identity(), tile=100), image)


def test_integers_are_rounded_half_to_even_then_clipped():
    class Half(nn.Module):
        def forward(self, x):
            return torch.tensor([0.5, 1.5, 2.5, -3.0, 300.0, 254.5]).reshape(1, 1, 1, 6) / 255

    output = restore(np.zeros((1, 6), np.uint8), Half())
    np.testing.assert_array_equal(output, [[0, 2, 2, 0, 255, 254]])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_floats_are_not_clipped(dtype):
    image = np.array([[-1.0, 0.75, 3.0]], dtype)
    np.testing.assert_array_equal(restore(image, Double()), 2 * image)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tensors_come_back_as_they_are(dtype):
    image = torch.rand(2, 3, 20, 17, dtype=dtype, requires_grad=True)
    before = image.detach().clone()
    output = restore(image, Double(), tile=16)
    assert output.dtype == dtype and output.shape == image.shape and not output.requires_grad
    torch.testing.assert_close(output, 2 * before.float().to(dtype), rtol=1e-6, atol=1e-6)
    assert torch.equal(image, before)


def test_result_can_enter_autograd():
    weight = nn.Parameter(torch.ones(()))
    for tile in (None, 16):
        (restore(torch.rand(1, 3, 20, 20), Double(), tile=tile) * weight).sum().backward()
    assert weight.grad > 0


def test_batch_of_zero_gives_an_empty_result(tiny):
    assert restore(torch.empty(0, 3, 20, 20), tiny).shape == (0, 3, 20, 20)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "I;16"])
def test_pil_modes_and_alpha_are_kept(mode):
    image = PIL.Image.fromarray(ramp(np.uint8, (9, 13, 4)))
    image = PIL.Image.fromarray(ramp(np.uint16, (9, 13))) if mode == "I;16" else image.convert(mode)
    image.info["icc_profile"] = b"profile"
    output = restore(image, nn.Identity())
    assert output.mode == mode and output.info["icc_profile"] == b"profile"
    visible = np.asarray(image)[..., -1:] > 2 if "A" in mode else np.True_
    np.testing.assert_array_equal(np.asarray(output) * visible, np.asarray(image) * visible)
    if "A" in mode:
        np.testing.assert_array_equal(np.asarray(output)[..., -1], np.asarray(image)[..., -1])


def test_alpha_is_not_restored():
    image = PIL.Image.fromarray(np.full((4, 4, 4), 100, np.uint8))
    np.testing.assert_array_equal(np.asarray(restore(image, Double()))[0, 0], [200, 200, 200, 100])


def test_palette_and_one_bit_are_converted():
    palette = PIL.Image.fromarray(ramp(np.uint8)).quantize(4)
    output = restore(palette, nn.Identity())
    assert output.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(output), np.asarray(palette.convert("RGB")))
    palette.info["transparency"] = 0
    output = restore(palette, nn.Identity())
    assert output.mode == "RGBA" and "transparency" not in output.info
    assert restore(PIL.Image.new("1", (3, 2), 1), nn.Identity()).getpixel((0, 0)) == 255


def test_gray_runs_as_three_equal_channels(tiny):
    image = ramp(np.float32, (17, 23))
    colour = restore(np.dstack([image] * 3), tiny)
    np.testing.assert_allclose(restore(image, tiny), colour.mean(2), atol=1e-6)
    assert restore(image[:, :, None], tiny).shape == (17, 23, 1)
    tensor = torch.from_numpy(image)[None, None]
    np.testing.assert_allclose(restore(tensor, tiny)[0, 0], colour.mean(2), atol=1e-6)


@pytest.mark.parametrize("channels, kind", [(1, "uint8"), (6, "float32")])
def test_models_of_other_channels(channels, kind):
    model = ipt_fast.create_model("ipt_v2_tiny", in_channels=channels, depths=(1, 1, 1, 1)).eval()
    image = ramp(np.dtype(kind), (10, 9, channels))
    assert restore(image, model).shape == (10, 9, min(channels, 3))
    with pytest.raises(ValueError, match=f"must have {channels} channels for this model; got 3"):
        restore(ramp(np.uint8), model)


# --- the model


def test_result_equals_the_model_itself(tiny):
    x = torch.rand(2, 3, 21, 30)
    with torch.no_grad():
        expected = tiny(x)
    torch.testing.assert_close(restore(x, tiny, dtype="float32"), expected, rtol=0, atol=1e-5)


def test_callers_model_is_left_as_it_is(tiny):
    model = copy.deepcopy(tiny).train().to(torch.bfloat16)
    before, config = copy.deepcopy(model.state_dict()), model.config
    restore(ramp(np.uint8), model)
    after = model.state_dict()
    assert model.training and model.config == config and list(after) == list(before)
    assert all(after[name].dtype == value.dtype and torch.equal(after[name], value) for name, value in before.items())


def test_model_that_writes_into_its_input_does_not_reach_the_image():
    class InPlace(nn.Module):
        def forward(self, x):
            return x.mul_(0)

    image = torch.rand(1, 1, 5, 5)
    assert not restore(image, InPlace()).any() and image.all()


def test_task_reaches_models_with_tasks_only():
    class Tasks(nn.Module):
        def forward(self, x, task="nothing"):
            return x * {"nothing": 1, "denoise": 0}[task]

    image = np.ones((4, 4), np.float32)
    assert not restore(image, Tasks(), task="denoise").any() and restore(image, Tasks()).all()
    with pytest.raises(ValueError, match="task must be None for Identity"):
        restore(image, nn.Identity(), task="denoise")


def test_restorer_is_prepared_once(tiny):
    restorer = Restorer(tiny, dtype="float32")
    image = ramp(np.uint8)
    np.testing.assert_array_equal(restorer(image), restore(image, tiny, dtype="float32"))
    assert restorer(ramp(np.uint16)).dtype == np.uint16


# --- tiles


def test_attributes_tell_how_a_restorer_runs_and_can_be_set():
    model = ipt_fast.create_model("ipt_tiny")
    restorer = Restorer(model, task="sr_x2")
    found = restorer.config, restorer.image_size, restorer.value_range, restorer.arguments, restorer.scale
    assert found == (model.config, 48, 255, {"task": "sr_x2"}, 2)

    restorer, image = Restorer(nn.Conv2d(3, 3, 3, padding=1)), torch.rand(1, 3, 9, 8)
    assert restorer.config is None and restorer.image_size is None
    assert restorer.value_range == 1 and restorer.arguments == {} and not restorer.self_ensemble
    once = restorer(image)
    restorer.self_ensemble = True
    assert torch.equal(restorer(image), restore(image, restorer.model, self_ensemble=True))
    assert not torch.equal(restorer(image), once)


@pytest.mark.parametrize("blend", ["cosine", "average"])
@pytest.mark.parametrize("tile, overlap", [(16, 0), (16, 8), (24, 5), (40, None), ("auto", None)])
@pytest.mark.parametrize("shape", [(1, 1), (16, 16), (37, 50), (5, 100)])
def test_tiles_of_a_pointwise_model_equal_the_whole(shape, tile, overlap, blend):
    image = ramp(np.float32, (*shape, 3))
    np.testing.assert_allclose(restore(image, Double(), tile=tile, overlap=overlap, blend=blend), 2 * image, rtol=1e-6)


def test_tiles_of_a_convolution_equal_the_whole_away_from_seams():
    image, model = torch.rand(1, 3, 70, 90), Blur()
    whole = restore(image, model, tile=None)
    seam = torch.zeros(70, 90, dtype=torch.bool)
    starts = {length: inference.tile_starts(length, 32, 8) for length in (70, 90)}
    reach = 2
    for axis, length in enumerate((70, 90)):
        for edge in [start for start in starts[length][1:]] + [start + 32 for start in starts[length][:-1]]:
            seam.narrow(axis, edge - reach, 2 * reach).fill_(True)
    tiled = restore(image, model, tile=32, overlap=8)
    assert 0.3 < seam.float().mean() < 0.8
    torch.testing.assert_close(tiled[..., ~seam], whole[..., ~seam], rtol=0, atol=1e-6)
    assert (tiled - whole).abs().max() > 1e-3


@pytest.mark.parametrize("tile", [None, 16, 24])
def test_a_model_of_any_size_may_enlarge(tile):
    class Enlarge(nn.Upsample):
        contract = Contract(scale=lambda task: 3)

    image = ramp(np.float32, (37, 50, 3))
    expected = image.repeat(3, 0).repeat(3, 1)
    np.testing.assert_allclose(restore(image, Enlarge(scale_factor=3), tile=tile), expected, rtol=1e-6)


def test_tile_as_large_as_the_image_is_the_whole_exactly(tiny):
    image = torch.rand(1, 3, 40, 33)
    whole = restore(image, tiny, tile=None)
    for tile in (40, 64, "auto"):
        assert torch.equal(restore(image, tiny, tile=tile), whole)


def test_all_tiles_have_one_size():
    sizes = set()

    class Record(nn.Module):
        def forward(self, x):
            sizes.add(tuple(x.shape[2:]))
            return x

    restore(np.zeros((100, 77), np.float32), Record(), tile=33, overlap=7)
    assert sizes == {(33, 33)}


def test_auto_tile_follows_memory(monkeypatch):
    sizes = []
    model = ipt_fast.create_model("ipt_v2_tiny")
    monkeypatch.setattr(type(model), "forward", lambda self, x: sizes.append(tuple(x.shape[2:])) or x)
    monkeypatch.setattr(inference, "available_memory", lambda device: 8000 * 256 * 200)
    with ipt_fast.use_backend("reference"):
        restore(np.zeros((300, 200, 3), np.uint8), model)
    assert sizes == [(168, 200)] * 2
    if _extension.load():  # which takes a fifth of the memory
        sizes.clear()
        restore(np.zeros((300, 200, 3), np.uint8), model)
        assert sizes == [(300, 200)]
    sizes.clear()
    monkeypatch.setattr(inference, "available_memory", lambda device: 10**12)
    restore(np.zeros((300, 200, 3), np.uint8), model)
    assert sizes == [(300, 200)]


def test_progress_counts_tiles():
    calls = []
    Restorer(nn.Identity(), tile=16, overlap=0, progress=lambda *call: calls.append(call))(np.zeros((32, 48), np.uint8))
    assert calls == [(i, 6) for i in range(1, 7)]


# --- self-ensemble


def test_self_ensemble_is_the_mean_over_eight_views():
    image = torch.rand(1, 3, 18, 25)
    model = Blur()
    expected = torch.zeros_like(image)
    for turns in range(4):
        for flip in (False, True):
            view = torch.rot90(image, turns, (2, 3))
            view = view.flip(3) if flip else view
            output = model(view).detach()
            output = output.flip(3) if flip else output
            expected += torch.rot90(output, -turns, (2, 3)) / 8
    torch.testing.assert_close(restore(image, model, self_ensemble=True, dtype="float32"), expected)
    torch.testing.assert_close(restore(image, Double(), self_ensemble=True, tile=16), 2 * image)


# --- precision


class FailsInHalf(nn.Module):
    """1 in float32, infinity where a convolution runs in float16."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1, bias=False)
        nn.init.constant_(self.conv.weight, 1e4)

    def forward(self, x):
        return self.conv(self.conv(x)) / 1e8


def test_non_finite_tiles_are_run_again_in_float32():
    image = torch.ones(1, 1, 16, 40)
    image[..., 20:] = 0
    with pytest.warns(UserWarning, match="non-finite in float16, running it again in float32") as caught:
        output = restore(image, FailsInHalf(), dtype="float16", tile=16, overlap=0)
    assert len(caught) == 2  # of three tiles, the last holds zeros only
    torch.testing.assert_close(output, image)


def test_output_that_is_never_finite_is_an_error():
    class Broken(nn.Module):
        def forward(self, x):
            return x / 0

    with pytest.raises(ValueError, match="model must return finite values"):
        restore(np.ones((4, 4), np.float32), Broken(), dtype="float32")


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"])
def test_bfloat16_is_close_and_really_used(tiny, dtype):
    x = torch.rand(1, 3, 32, 32)
    half, full = restore(x, tiny, dtype=dtype), restore(x, tiny, dtype=torch.float32)
    assert half.dtype == torch.float32 and not torch.equal(half, full)
    assert (half - full).abs().max() < 0.02


def test_auto_dtype_takes_bfloat16_where_the_cpu_has_it(monkeypatch):
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
    assert Restorer(nn.Identity()).dtype == torch.float32
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    assert Restorer(nn.Identity()).dtype == torch.bfloat16
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.delattr(torch.cpu, name)
    assert Restorer(nn.Identity()).dtype == torch.float32


# --- memory


class Greedy(nn.Module):
    def __init__(self, limit, error):
        super().__init__()
        self.limit, self.error = limit, error

    def forward(self, x):
        if max(x.shape[2:]) > self.limit:
            raise self.error
        return x


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
@pytest.mark.parametrize("tile", [None, "auto", 600])
def test_out_of_memory_halves_the_tile(tile, error):
    image = ramp(np.uint8, (700, 150))
    with pytest.warns(UserWarning, match="out of memory with tiles of"):
        output = restore(image, Greedy(200, error), tile=tile)
    np.testing.assert_array_equal(output, image)


def test_out_of_memory_at_the_smallest_tile_is_raised():
    with warnings.catch_warnings(), pytest.raises(torch.OutOfMemoryError):
        warnings.simplefilter("ignore")
        restore(np.zeros((300, 300), np.uint8), Greedy(100, torch.OutOfMemoryError("no")))


def test_other_errors_of_the_model_are_not_swallowed():
    with pytest.raises(RuntimeError, match="shape mismatch"):
        restore(np.zeros((300, 300), np.uint8), Greedy(100, RuntimeError("shape mismatch")))
