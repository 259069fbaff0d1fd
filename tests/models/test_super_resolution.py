"""IPT-V2 with a tail that enlarges: convolution, pixel-shuffle, bicubic residual."""

import pickle

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F

import ipt_fast
from ipt_fast.cli import main
from ipt_fast.models.contract import describe
from tests.models.micro import micro_model
from tests.models.test_to_reference import check_runtimes


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [(1, 1), (3, 3), (6, 3), (1, 3)])
def test_any_size_and_channel_count(channels, scale):
    model = micro_model(in_channels=channels[0], out_channels=channels[1], scale=scale)
    assert describe(model).scale(None) == scale and describe(model).out_channels == channels[1]
    for batch, height, width in ((2, 9, 17), (0, 8, 8), (1, 1, 1)):
        out = model(torch.rand(batch, channels[0], height, width))
        assert out.shape == (batch, channels[1], scale * height, scale * width) and out.isfinite().all()


def test_the_image_is_convolution_shuffle_and_residual():
    model, x = micro_model(scale=3, depths=(1, 0, 0, 0)), torch.rand(1, 3, 8, 16)
    seen = []
    model.output.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    out = model(x)
    features, parts = seen[0]
    assert model.output.weight.shape == (27, 16, 3, 3)
    torch.testing.assert_close(parts, F.conv2d(features, model.output.weight, padding=1))
    expected = torch.empty(1, 3, 24, 48)
    for i in range(3):
        for j in range(3):
            expected[:, :, i::3, j::3] = parts[:, 3 * i + j :: 9]
    torch.testing.assert_close(out - F.interpolate(x, size=(24, 48), mode="bicubic"), expected)


def test_the_residual_of_two_views_is_their_mean_enlarged():
    model, x = micro_model(in_channels=6, scale=2), torch.rand(1, 6, 5, 7)
    with torch.no_grad():
        model.output.weight.zero_()
    expected = F.interpolate((x[:, :3] + x[:, 3:]) / 2, scale_factor=2, mode="bicubic")
    torch.testing.assert_close(model(x), expected)


def test_forms_and_files(tmp_path):
    model, x = micro_model(scale=2), torch.rand(2, 3, 11, 14)
    with torch.no_grad():
        expected = model(x)
        tolerance = 2e-5 * expected.abs().max()
        assert (ipt_fast.freeze(model)(x) - expected).abs().max() <= tolerance
        assert (model.to_reference()(x) - expected).abs().max() <= tolerance
        model.save_pretrained(tmp_path)
        again = ipt_fast.models.open_model(tmp_path)
        assert again.config.scale == 2 and torch.equal(again(x), expected)
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            out = again.to(dtype)(x.to(dtype))
            assert out.dtype == dtype and (out.double() - expected).abs().max() < 0.05
    model.reparameterize()
    assert pickle.loads(pickle.dumps(model.contract)).scale(None) == 2


def test_training():
    model, x = micro_model(scale=2).train(), torch.rand(2, 3, 16, 16)
    target = F.interpolate(x, scale_factor=2.0, mode="bicubic") + 0.1
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    loss = F.mse_loss(model(x), target)
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    optimizer.step()
    assert F.mse_loss(model(x), target) < loss


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_onnx_of_any_size(tmp_path):
    model = micro_model(scale=2, merged=True, depths=(1, 0, 0, 0))
    check_runtimes(model, torch.rand(2, 3, 24, 48), [(1, 3, 16, 9), (2, 3, 70, 9)], tmp_path)


def test_restorer_and_tiles():
    model, image = micro_model(scale=3), np.random.default_rng(0).random((50, 43, 3), np.float32)
    whole = ipt_fast.restore(image, model, tile=None, dtype="float32")
    with torch.no_grad():
        expected = model(torch.from_numpy(image).permute(2, 0, 1)[None])[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(whole, expected, atol=1e-5)
    tiled = ipt_fast.restore(image, model, tile=32, self_ensemble=True)
    assert tiled.shape == (150, 129, 3) and np.isfinite(tiled).all()
    restored = ipt_fast.restore(PIL.Image.new("RGBA", (20, 10), (90, 30, 200, 77)), model)
    assert (restored.size, restored.mode) == ((60, 30), "RGBA")


def test_commands(tmp_path, capsys):
    model = micro_model(scale=2)
    with torch.no_grad():
        model.output.weight.mul_(0.01)
    model.save_pretrained(tmp_path / "model")
    pixels = np.random.default_rng(1).integers(0, 256, (30, 40, 3), np.uint8)
    (tmp_path / "photos").mkdir()
    photo = tmp_path / "photos" / "photo.png"
    PIL.Image.fromarray(pixels).save(photo)
    choice = ["--model", str(tmp_path / "model")]
    assert main(["restore", str(photo), str(tmp_path / "out.png"), *choice]) == 0
    with PIL.Image.open(tmp_path / "out.png") as restored:
        assert restored.size == (80, 60)
    assert main(["eval", "--data", str(tmp_path / "photos"), "--dtype", "float32", *choice]) == 0
    row = capsys.readouterr().out.splitlines()[-1].split()
    assert abs(float(row[3]) - float(row[4])) < 1  # a photo shrunk by 2: bicubic before, nearly bicubic after
    assert main(["plot", "restorations", str(tmp_path / "plot.png"), "--image", str(photo), *choice]) == 0
    capsys.readouterr()
    assert (
        main(["plot", "restorations", str(tmp_path / "no.png"), "--image", str(photo), *choice, "--task", "sr_x3"]) == 2
    )
    assert "--task must be one that enlarges 2 times" in capsys.readouterr().err
    assert main(["restore", str(photo), str(tmp_path / "no.png"), *choice, "--noise", "10"]) == 2
    assert f"is the input itself; got {tmp_path / 'model'}" in capsys.readouterr().err
