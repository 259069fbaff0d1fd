"""LPIPS against its formula written out pixel by pixel, against its authors' package, and by its exact properties."""

import importlib.util
import sys
import types

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn.functional import max_pool2d, unfold

from ipt_fast.evaluation.lpips import LPIPS, load_lpips

SHAPES = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}


def random_state(seed=0):
    """Weights that keep the size of what goes through them, and heads that are not negative, as the published ones."""
    torch.manual_seed(seed)
    state = {}
    for index, (layer, (outputs, inputs, kernel)) in enumerate(SHAPES.items()):
        weight = torch.randn(outputs, inputs, kernel, kernel) * (2 / inputs / kernel**2) ** 0.5
        state |= {f"features.{layer}.weight": weight, f"features.{layer}.bias": 0.1 * torch.randn(outputs)}
        state[f"lin{index}.model.1.weight"] = torch.rand(1, outputs, 1, 1) / outputs
    return state


@pytest.fixture(scope="module")
def state():
    return random_state()


def images(height=40, width=47, seed=0):
    return np.random.default_rng(seed).random((2, height, width, 3))


def expected_distance(first, second, state):
    """Equation 1 of the paper in float64: convolutions as products with the patches of the padded image."""
    stacks = []
    for image in (first, second):
        shifted = (2 * image - 1 - [-0.030, -0.088, -0.188]) / [0.458, 0.448, 0.450]
        values, found = torch.from_numpy(shifted).permute(2, 0, 1)[None], []
        for layer, stride, padding, pooled in ((0, 4, 2, 0), (3, 1, 2, 1), (6, 1, 1, 1), (8, 1, 1, 0), (10, 1, 1, 0)):
            if pooled:
                values = max_pool2d(values, 3, 2)
            weight, bias = (state[f"features.{layer}.{kind}"].double() for kind in ("weight", "bias"))
            size = weight.shape[2]
            places = [(side + 2 * padding - size) // stride + 1 for side in values.shape[2:]]
            patches = unfold(values, size, padding=padding, stride=stride)[0]
            values = (weight.flatten(1) @ patches + bias[:, None]).clamp(min=0).reshape(1, -1, *places)
            found.append(values[0])
        stacks.append(found)
    total = 0.0
    for index, (a, b) in enumerate(zip(*stacks, strict=True)):
        a, b = (each / ((each**2).sum(0) ** 0.5 + 1e-10) for each in (a, b))
        weights = state[f"lin{index}.model.1.weight"].double().reshape(-1, 1, 1)
        total += float((weights * (a - b) ** 2).sum(0).mean())
    return total


@pytest.mark.parametrize("size", [(31, 31), (40, 47), (64, 33)])
def test_equals_the_formula(state, size):
    first, second = images(*size)
    expected = expected_distance(first, second, state)
    assert expected > 0.01
    assert LPIPS(state).compare(first, second) == pytest.approx(expected, rel=1e-4)


def alexnet(*_, **__):
    """The trunk of torchvision's AlexNet, by the numbers of its layers."""
    convolutions = [
        (3, 64, 11, 4, 2),
        (64, 192, 5, 1, 2),
        (192, 384, 3, 1, 1),
        (384, 256, 3, 1, 1),
        (256, 256, 3, 1, 1),
    ]
    layers = []
    for index, each in enumerate(convolutions):
        layers += [nn.Conv2d(*each), nn.ReLU(), *([nn.MaxPool2d(3, 2)] if index in (0, 1, 4) else [])]
    return types.SimpleNamespace(features=nn.Sequential(*layers))


def test_equals_the_package_of_its_authors(state, monkeypatch):
    for package in ("lpips", "scipy", "tqdm"):  # which it needs
        if not importlib.util.find_spec(package):
            pytest.skip(f"the package {package} is not installed")
    # It takes torchvision for AlexNet alone, and not all versions of that go with this one of torch.
    torchvision = types.ModuleType("torchvision")
    torchvision.models = types.SimpleNamespace(alexnet=alexnet)
    monkeypatch.setitem(sys.modules, "torchvision", torchvision)
    import lpips

    theirs = lpips.LPIPS(pretrained=False, pnet_rand=True, net="alex", verbose=False).eval()
    names = {f"features.{layer}": f"net.slice{index + 1}.{layer}" for index, layer in enumerate(SHAPES)}
    parameters = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, value in state.items():
            stem, _, kind = name.rpartition(".")
            parameters[f"{names[stem]}.{kind}" if stem in names else name].copy_(value)
        first, second = (torch.from_numpy(each).float().permute(2, 0, 1)[None] for each in images())
        expected = theirs(first, second, normalize=True).flatten()
    torch.testing.assert_close(LPIPS(state)(first, second), expected, rtol=1e-5, atol=1e-7)


def test_properties(state):
    lpips, (first, second) = LPIPS(state), images()
    assert lpips.compare(first, first) == 0
    assert lpips.compare(first, second) == pytest.approx(lpips.compare(second, first), rel=1e-6)
    near = first + 0.1 * (second - first)
    assert 0 < lpips.compare(first, near) < lpips.compare(first, second)
    assert lpips.compare(first, second + 3) == lpips.compare(first, np.ones_like(first))  # clipped
    gray = first[..., :1]
    assert lpips.compare(gray, second[..., :1]) == lpips.compare(gray.repeat(3, 2), second[..., :1].repeat(3, 2))


def test_weights_in_files_and_folders(state, tmp_path):
    expected = LPIPS(state).compare(*images())
    trunk = {name: value for name, value in state.items() if name.startswith("features")}
    trunk["classifier.1.weight"] = torch.zeros(2, 2)  # what else torchvision's file has
    heads = {name: value for name, value in state.items() if name.startswith("lin")}
    torch.save(trunk, tmp_path / "alexnet-owt.pth")
    torch.save(heads, tmp_path / "alex.pth")
    for paths in ([tmp_path], [tmp_path / "alex.pth", tmp_path / "alexnet-owt.pth"]):
        assert load_lpips(paths).compare(*images()) == expected
    safetensors.torch.save_file(state, tmp_path / "all.safetensors")
    assert load_lpips([tmp_path / "all.safetensors"]).compare(*images()) == expected


def test_weights_that_are_not_all_there(state, tmp_path):
    torch.save({name: value for name, value in state.items() if "lin" not in name}, tmp_path / "trunk.pth")
    with pytest.raises(ValueError, match=r"must hold lin0.model.1.weight of shape \(1, 64, 1, 1\); got none"):
        load_lpips([tmp_path / "trunk.pth"])
    with pytest.raises(ValueError, match=r"features.3.bias of shape \(192,\); got \(7,\)"):
        LPIPS(state | {"features.3.bias": torch.zeros(7)})
    with pytest.raises(ValueError, match="path must be a file of weights"):
        load_lpips([tmp_path / "nothing.pth"])


def test_bad_images(state):
    with pytest.raises(ValueError, match="at least 31x31 pixels for LPIPS; got 30x40"):
        LPIPS(state).compare(*images(30, 40))
    with pytest.raises(ValueError, match=r"of one shape; got \(1, 3, 40, 47\) and \(1, 3, 39, 47\)"):
        LPIPS(state).compare(images()[0], images()[1][1:])
