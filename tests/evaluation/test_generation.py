"""FID, sFID, Inception Score, precision and recall against formulas written in another way, and what is refused."""

import importlib.util
import math
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from ipt_fast.data.npz import NpzImages, comment_of, read_npz, write_npz
from ipt_fast.evaluation import generation
from ipt_fast.evaluation.features import FeatureNetwork, Features, collect, open_features
from ipt_fast.evaluation.generation import (
    FIGURES,
    Gaussian,
    figures_of,
    frechet_distance,
    gaussian_of,
    inception_score,
    precision_and_recall,
    read_statistics,
    statistics_of,
    write_statistics,
)


def draw(images, width, seed=0, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator)
    return torch.randn(images, width, generator=generator) @ mixing * scale + shift


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(generation, "_BLOCK", 7)


# -- distributions and their distance -------------------------------------------------------------------------------


def test_mean_and_covariance():
    features = draw(31, 5, shift=100.0)
    found = gaussian_of(features)
    assert found.mean.dtype == found.covariance.dtype == torch.float64
    np.testing.assert_allclose(found.mean, features.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(features.double().numpy(), rowvar=False), rtol=1e-10)


@pytest.mark.parametrize("images", [60, 9])  # of 9 the covariance is singular
def test_the_distance_by_a_root_of_the_matrix(images):
    linalg = pytest.importorskip("scipy.linalg")
    one, other = gaussian_of(draw(images, 12)), gaussian_of(draw(50, 12, seed=1, scale=2.0, shift=0.3))
    a, b = (gaussian.covariance.numpy() for gaussian in (one, other))
    with warnings.catch_warnings(action="ignore"):
        root = linalg.sqrtm(a @ b)
    expected = ((one.mean - other.mean) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * np.trace(root).real
    assert frechet_distance(one, other) == pytest.approx(float(expected), rel=1e-6)
    assert frechet_distance(other, one) == pytest.approx(float(expected), rel=1e-6)


def test_the_distance_of_diagonal_gaussians():
    means = torch.tensor([[0.0, 1.0, -2.0], [0.5, 1.0, 3.0]], dtype=torch.float64)
    deviations = torch.tensor([[1.0, 2.0, 0.0], [3.0, 0.5, 0.25]], dtype=torch.float64)
    one, other = (Gaussian(mean, torch.diag(s.square())) for mean, s in zip(means, deviations, strict=True))
    expected = (means[0] - means[1]).square().sum() + (deviations[0] - deviations[1]).square().sum()
    assert frechet_distance(one, other) == pytest.approx(expected.item(), rel=1e-12)


def test_the_distance_to_itself_is_zero_and_a_shift_counts_by_its_square():
    features = draw(40, 6)
    one = gaussian_of(features)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(one, gaussian_of(features + 2)) == pytest.approx(6 * 4, rel=1e-6)


# -- scores ---------------------------------------------------------------------------------------------------------


def test_inception_score_by_its_definition():
    logits = 3 * draw(23, 4)
    scores = []
    for start in (0, 10, 20):
        p = torch.softmax(logits[start : start + 10].double(), 1).numpy()
        scores.append(np.exp(np.mean(np.sum(p * (np.log(p) - np.log(p.mean(0, keepdims=True))), 1))))
    assert inception_score(logits, split=10) == pytest.approx(np.mean(scores), rel=1e-10)


def test_inception_score_at_its_bounds():
    sure = torch.eye(5).repeat(3, 1) * 1000  # each class as often, without doubt: probabilities of 0
    assert inception_score(sure) == pytest.approx(5)
    assert inception_score(torch.zeros(6, 5)) == pytest.approx(1)


def brute_force(points, centres, nearest):
    """The share of points in the manifold of centres, one distance at a time."""
    found = 0
    radii = [sorted(math.dist(a, b) for b in centres)[nearest] for a in centres]  # the first is that to itself
    for point in points:
        found += any(math.dist(point, centre) <= radius for centre, radius in zip(centres, radii, strict=True))
    return found / len(points)


@pytest.mark.parametrize("nearest", [1, 3])
def test_precision_and_recall_by_brute_force(nearest):
    samples, reference = draw(25, 3), draw(33, 3, seed=1, scale=0.5)
    precision, recall = precision_and_recall(samples, reference, nearest)
    assert precision == brute_force(samples.tolist(), reference.tolist(), nearest)
    assert recall == brute_force(reference.tolist(), samples.tolist(), nearest)
    assert 0 < precision < 1 and 0 < recall < 1


def test_precision_and_recall_of_what_is_easy():
    features = draw(20, 4)
    assert precision_and_recall(features, features) == (1, 1)
    assert precision_and_recall(features, features + 1000) == (0, 0)
    one_mode = torch.cat([features[:1] + 1e-3 * draw(10, 4, seed=3)])  # precise, but it misses the rest
    precision, recall = precision_and_recall(one_mode, features)
    assert precision == 1 and recall < 0.2


# -- sets of images -------------------------------------------------------------------------------------------------


class Tiny(nn.Module):
    """A network of uint8 images with all outputs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.maps, self.classes = nn.Conv2d(3, 9, 3, 2, 1), nn.Linear(9, 4)

    def forward(self, images) -> dict[str, torch.Tensor]:
        maps = self.maps(images.float() / 127.5 - 1).relu()
        pool = maps.mean((2, 3))
        return {"pool": pool, "spatial": maps, "logits": self.classes(pool)}


class PoolOnly(Tiny):
    def forward(self, images, return_features: bool = False):
        maps = self.maps(images.float() / 127.5 - 1).relu()
        return maps.mean((2, 3)) if return_features else self.classes(maps.mean((2, 3))).softmax(1)


def photos(count, size=6, channels=3, seed=0):
    return list(np.random.default_rng(seed).integers(0, 256, (count, size, size, channels), dtype=np.uint8))


def save(network, path):
    with warnings.catch_warnings(action="ignore"):
        if path.suffix == ".pt":
            torch.jit.script(network).save(path)
        else:
            example = (torch.zeros(2, 3, 6, 6, dtype=torch.uint8),)
            sizes = ({0: torch.export.Dim("batch")},)
            torch.export.save(torch.export.export(network, example, dynamic_shapes=sizes), path)
    return path


@pytest.mark.parametrize("suffix", [".pt", ".pt2"])
def test_networks_by_path(tmp_path, suffix):
    network = Tiny().eval()
    found = collect(open_features(save(network, tmp_path / f"net{suffix}")), photos(5), batch_size=2)
    with torch.no_grad():
        expected = network(torch.from_numpy(np.stack(photos(5))).permute(0, 3, 1, 2))
    torch.testing.assert_close(found.pool, expected["pool"])
    torch.testing.assert_close(found.spatial, expected["spatial"].permute(0, 2, 3, 1)[..., :7].flatten(1))
    torch.testing.assert_close(found.logits, expected["logits"])


@pytest.mark.parametrize("outputs", [["pool"], ["spatial", "pool"]])
def test_networks_of_onnx(tmp_path, outputs):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    helper, floats = onnx.helper, onnx.TensorProto.FLOAT
    shapes = {"spatial": ["B", 3, "H", "W"], "pool": ["B", 3, 1, 1]}
    graph = helper.make_graph(
        [helper.make_node("Cast", ["images"], ["spatial"], to=floats),
         helper.make_node("GlobalAveragePool", ["spatial"], ["pool"])],
        "mean",
        [helper.make_tensor_value_info("images", onnx.TensorProto.UINT8, ["B", 3, "H", "W"])],
        [helper.make_tensor_value_info(name, floats, shapes[name]) for name in outputs],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, tmp_path / "net.onnx")
    found = collect(open_features(tmp_path / "net.onnx"), photos(3), batch_size=2)
    np.testing.assert_allclose(found.pool, np.stack(photos(3)).mean((1, 2)), rtol=1e-5)
    assert found.spatial is None if outputs == ["pool"] else found.spatial.shape == (3, 3 * 36)


def test_a_network_that_returns_features_when_it_is_asked(tmp_path):
    found = collect(open_features(save(PoolOnly().eval(), tmp_path / "net.pt")), photos(3))
    assert found.pool.shape == (3, 9) and found.spatial is None and found.logits is None


def test_images_of_two_sizes_and_gray_ones():
    network = FeatureNetwork(lambda images: images.float().mean((2, 3)), "mean")
    images = [*photos(2), *photos(1, 8), *photos(2, channels=1)]
    found = collect(network, images, batch_size=4)
    expected = [np.broadcast_to(image.mean((0, 1)), 3) for image in images]
    np.testing.assert_allclose(found.pool, np.stack(expected), rtol=1e-6)


def features_of(images, seed, width=3):
    return Features(draw(images, width, seed), draw(images, 2 * width, seed), draw(images, 4, seed))


def test_all_figures():
    samples, real = features_of(20, 0), features_of(30, 1)
    figures = figures_of(samples, statistics_of(real))
    assert tuple(figures) == FIGURES
    assert figures == {
        "fid": frechet_distance(gaussian_of(samples.pool), gaussian_of(real.pool)),
        "sfid": frechet_distance(gaussian_of(samples.spatial), gaussian_of(real.spatial)),
        "inception_score": inception_score(samples.logits),
        "precision": precision_and_recall(samples.pool, real.pool)[0],
        "recall": precision_and_recall(samples.pool, real.pool)[1],
    }


def test_figures_of_what_is_known():
    samples = features_of(20, 0)
    assert [name for name, value in figures_of(samples, None).items() if value is not None] == ["inception_score"]
    reference = generation.Statistics(gaussian_of(draw(9, 3, 1)))
    assert [name for name, value in figures_of(Features(samples.pool), reference).items() if value is not None] == [
        "fid"
    ]
    with pytest.warns(UserWarning, match="FID of 3 images is larger than that of many, as 3 features"):
        figures_of(Features(samples.pool[:3]), reference)


def test_statistics_in_files(tmp_path):
    statistics = statistics_of(features_of(20, 0))
    write_statistics(tmp_path / "s.npz", statistics)
    with np.load(tmp_path / "s.npz") as arrays:
        assert sorted(arrays.files) == ["mu", "mu_s", "sigma", "sigma_s"]
    found = read_statistics(tmp_path / "s.npz")
    assert torch.equal(found.pool.mean, statistics.pool.mean) and found.points is None
    assert torch.equal(found.spatial.covariance, statistics.spatial.covariance)
    np.savez(tmp_path / "images.npz", arr_0=np.stack(photos(2)))
    assert read_statistics(tmp_path / "images.npz") is None


def test_images_in_files(tmp_path):
    images = photos(5)
    with write_npz(tmp_path / "o.npz", 5, [3, 1, 2, 0, 9], comment="mine") as add:
        for image in images:
            add(image)
    with np.load(tmp_path / "o.npz") as arrays:
        assert np.array_equal(arrays["arr_0"], np.stack(images)) and arrays["arr_1"].tolist() == [3, 1, 2, 0, 9]
    assert comment_of(tmp_path / "o.npz") == "mine"
    np.savez_compressed(tmp_path / "theirs.npz", np.stack(images))
    assert comment_of(tmp_path / "theirs.npz") == ""
    for name in ("o.npz", "theirs.npz"):
        found = NpzImages(tmp_path / name)
        assert found.shape == (5, 6, 6, 3) and np.array_equal(np.stack([*found]), np.stack(images))
    with pytest.raises(ValueError, match="images must be 2, as was said; got 1"):  # noqa: SIM117
        with write_npz(tmp_path / "less.npz", 2) as add:
            add(images[0])
    assert not (tmp_path / "less.npz").exists()
    with pytest.raises(ValueError, match=r"images must be 1 of shape \(6, 6, 3\) and uint8; got one more"):  # noqa: SIM117
        with write_npz(tmp_path / "more.npz", 1) as add:
            add(images[0])
            add(images[1])


# -- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gaussian_of(torch.zeros(1, 3)), "features must be of at least 2 images for a covariance; got 1"),
        (lambda: gaussian_of(torch.zeros(4, 3, 2)), r"features must be \(N, D\); got \(4, 3, 2\)"),
        (lambda: gaussian_of(torch.full((4, 3), torch.nan)), "features must be finite; got NaN or infinity"),
        (lambda: frechet_distance(gaussian_of(draw(9, 3)), gaussian_of(draw(9, 4))),
         "features must be as wide as those they are compared with, 4; got 3"),
        (lambda: precision_and_recall(draw(3, 4), draw(9, 4)),
         "samples must be of at least 4 images for balls to the neighbour 3; got 3"),
        (lambda: precision_and_recall(draw(9, 4), draw(9, 5)), "samples must be as wide as the reference, 5; got 4"),
        (lambda: inception_score(torch.zeros(0, 3)), "logits must be of at least 1 images for an Incep"),
        (lambda: Gaussian(torch.zeros(3), torch.zeros(3, 2)), r"must be \(D,\) and \(D, D\); got \(3,\) and \(3, 2\)"),
        (lambda: collect(FeatureNetwork(lambda x: x, "net"), []), "images must be at least one; got none"),
        (lambda: collect(FeatureNetwork(lambda x: {"logits": x}, "net"), photos(1)), "pool; got net with"),
        (lambda: collect(FeatureNetwork(lambda x: x.sum((1, 2, 3)), "net"), photos(1)),
         r"pool of the network must be \(B, D\) for 1 images; got \(1,\) of net"),
        (lambda: collect(FeatureNetwork(lambda x: {"pool": x, "spatial": x[:, 0]}, "net"), photos(1)),
         r"spatial of the network must be \(B, C, h, w\) for 1 images; got \(1, 6, 6\)"),
        (lambda: collect(FeatureNetwork(nn.Linear(3, 2), "net"), photos(1)),
         r"features must be a network that takes \(1, 3, 6, 6\) uint8; got net, which fails: "),
        (lambda: collect(FeatureNetwork(lambda x: x.float().flatten(1), "net"), [*photos(1), *photos(1, 7)]),
         r"features must be of one width for all images; got \[108, 147\]"),
    ],
)  # fmt: skip
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_files_of_the_wrong_kind(tmp_path):
    np.savez(tmp_path / "other.npz", features=np.zeros(3))
    with pytest.raises(ValueError, match="must hold statistics, mu and sigma, or images, arr_0; got features"):
        read_statistics(tmp_path / "other.npz")
    np.savez(tmp_path / "odd.npz", mu=np.zeros(3), sigma=np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"mu and sigma in .* must be mean and covariance: .*\(3,\) and \(2, 2\)"):
        read_statistics(tmp_path / "odd.npz")
    for name, array in (("float", np.zeros((2, 4, 4, 3))), ("flat", np.zeros((2, 4), np.uint8))):
        np.savez(tmp_path / f"{name}.npz", array)
        with pytest.raises(ValueError, match=r"arr_0 must be \(N, H, W, 1 or 3\) uint8; got"):
            NpzImages(tmp_path / f"{name}.npz")
    np.save(tmp_path / "single.npy", np.zeros(3))
    (tmp_path / "single.npy").rename(tmp_path / "single.npz")
    (tmp_path / "damaged.npz").write_bytes(b"PK\x03\x04 and no more")
    for name in ("single", "damaged", "none"):
        with pytest.raises(ValueError, match=f"cannot read .*{name}.npz"):
            read_npz(tmp_path / f"{name}.npz")
        with pytest.raises(ValueError, match=f"cannot read .*{name}.npz"):
            NpzImages(tmp_path / f"{name}.npz")


def test_networks_that_cannot_be_opened(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"features must be a file that ends in \.pt2, \.onnx"):
        open_features(tmp_path / "net.bin")
    for suffix in (".pt", ".pt2"):
        (tmp_path / f"net{suffix}").write_bytes(b"nonsense")
        with pytest.raises(ValueError, match="features must be a network that can be read; got"):
            open_features(tmp_path / f"net{suffix}")
    (tmp_path / "net.onnx").write_bytes(b"nonsense")
    if importlib.util.find_spec("onnxruntime"):
        with pytest.raises(ValueError, match=r"features must be a network that can be read; got .*ONNXRuntimeError"):
            open_features(tmp_path / "net.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"pip install 'ipt-fast\[fid\]'"):
        open_features(tmp_path / "net.onnx")
