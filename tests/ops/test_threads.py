"""Many threads: the same numbers, and work cut so that the longest share is short."""

import math
import os
import subprocess
import sys

import pytest
import torch

from ipt_fast import _extension

pytestmark = pytest.mark.skipif(not _extension.load(), reason="the C++ kernels are not built")

PROGRAM = """
import sys, torch, ipt_fast
from tests.ops.cases import CALLS, build
torch.set_num_threads(int(sys.argv[1]))
found = {}
for call in (
    "leffn_layer", "feed_forward_layer", "feed_forward_layer/gdfn", "focal_attention_layer", "grid_attention_layer",
    "channel_attention", "channel_attention/overlapping", "channel_attention_layer", "channel_attention_layer/windows",
    "window_attention", "window_attention_layer",
):
    torch.manual_seed(0)
    operator, tensors, options = build(call, (2, 37, 53))
    for dtype in (torch.float32, torch.bfloat16):
        leaves = {n: None if t is None else t.to(dtype).requires_grad_() for n, t in tensors.items()}
        with ipt_fast.use_backend("cpu"):
            out = getattr(ipt_fast.ops, operator)(**leaves, **options)
            out.float().square().sum().backward()
        found[call, str(dtype)] = [out.detach()] + [t.grad for t in leaves.values() if t is not None]
torch.save(found, sys.argv[2])
"""


def results(threads, folder):
    target = folder / f"{threads}.pt"
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    subprocess.run([sys.executable, "-c", PROGRAM, str(threads), str(target)], check=True, env=environment)
    return torch.load(target)


@pytest.fixture(scope="module")
def of_one(tmp_path_factory):
    return results(1, tmp_path_factory.mktemp("threads"))


@pytest.mark.parametrize("threads", [3, 64, 128])
def test_the_outputs_do_not_depend_on_the_threads(threads, of_one, tmp_path):
    found = results(threads, tmp_path)
    for call, (out, *gradients) in of_one.items():
        assert torch.equal(found[call][0], out), call
        for one, many in zip(gradients, found[call][1:], strict=True):  # of sums in another order
            assert (many - one).abs().max() <= 4 * torch.finfo(one.dtype).eps * one.abs().max(), call


def most(tasks, threads):
    return math.ceil(tasks / threads)


@pytest.mark.parametrize(
    ("channels", "side", "threads", "limit"),
    [(32, 256, 2, 1.1), (32, 256, 64, 1.3), (64, 128, 32, 1.5), (128, 64, 64, 2.6), (256, 32, 32, 3.8)],
)
def test_bands_and_strips_share_the_work(channels, side, threads, limit):
    """Rows and columns of the longest share, with what neighbours compute, too, beside an even share of the map.

    Bands across the whole map, as few as there are threads, are at 1.03, 1.55, 1.59, 5.0 and 5.0.
    """
    bands, strips = torch.ops.ipt_fast_cpu.leffn_partition(1, side, side, channels, 4 * channels, channels, 5, threads)
    rows, columns = math.ceil(side / bands), math.ceil(side / 16 / strips) * 16
    halo = (rows + 4 * (bands > 1)) * (columns + 4 * (strips > 1))
    assert most(bands * strips, threads) * halo < limit * side * side / threads


@pytest.mark.parametrize("threads", [1, 2, 8, 32, 64])
def test_groups_of_heads_strips_and_shares(threads):
    side, window, heads = 256, 32, 1
    groups, strips, shares = torch.ops.ipt_fast_cpu.focal_partition(1, side, side, 32, heads, window, threads)
    blocks = side // (window // 2) + 1  # those of shifted windows begin and end with a half
    assert groups == 1
    assert strips * blocks >= threads  # two strips, which the ring needs, would give 34 tasks
    assert most(strips * blocks, threads) < 1.5 * strips * blocks / threads
    assert most(blocks**2 * shares, threads) < 1.5 * blocks**2 * shares / threads
