"""The CUDA C++ kernels on a GPU: the calls that tests/cuda emulates."""

import pytest
import torch

import ipt_fast
from tests.cuda.cases import SIZES, build
from tests.ops.cases import assert_within_rule, baseline, exact

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def on_cuda(operator, tensors, options):
    with ipt_fast.use_backend("cuda"), torch.no_grad():
        return getattr(ipt_fast.ops, operator)(**tensors, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SIZES)
def test_parity(name, dtype):
    operator, tensors, options = build(name, dtype)
    got = on_cuda(operator, tensors, options)
    assert all(torch.equal(on_cuda(operator, tensors, options), got) for _ in range(3))
    truth = exact(operator, tensors, options, torch.ones_like(got))
    base = baseline(operator, tensors, options, torch.ones_like(got))
    assert_within_rule({"out": got}, truth, base)


@pytest.mark.parametrize("name", SIZES)
def test_other_streams_and_cuda_graphs(name):
    operator, tensors, options = build(name, torch.bfloat16)
    expected = on_cuda(operator, tensors, options)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = on_cuda(operator, tensors, options)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(got, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = on_cuda(operator, tensors, options)
    got.zero_()
    graph.replay()
    assert torch.equal(got, expected)


@pytest.mark.skipif("torch.cuda.device_count() < 2", reason="there is one GPU")
@pytest.mark.parametrize("name", SIZES)
def test_another_gpu_than_the_current_one(name):
    operator, tensors, options = build(name, torch.bfloat16)
    expected = on_cuda(operator, tensors, options)
    got = on_cuda(operator, {key: value.to("cuda:1") for key, value in tensors.items()}, options)
    assert got.device.index == 1 and torch.equal(got.to("cuda:0"), expected)
