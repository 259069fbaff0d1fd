"""The bound of a launch counts what the machine code does: trips of loops, accesses, special functions, products."""

import re

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed (pip install ipt-fast[triton])")

import triton.language as tl  # noqa: E402

from benchmarks import ahead_of_time, bound, predict, sass, warp  # noqa: E402
from ipt_fast.kernels._launch import INTERPRETED, Launch, Work  # noqa: E402

pytestmark = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1: nothing is compiled")


@triton.jit(do_not_specialize=["rows"])
def sum_kernel(x, y, rows, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    # of this program's rows of x, in blocks of columns
    o_c = tl.arange(0, BLOCK)
    b_sum = tl.zeros((BLOCK,), dtype=tl.float32)
    for i_row in range(rows):
        for i_c in range(0, COLUMNS, BLOCK):
            b_sum += tl.load(x + (tl.program_id(0) * rows + i_row) * COLUMNS + i_c + o_c)
    tl.store(y + tl.program_id(0) * BLOCK + o_c, b_sum)


@triton.jit
def copy_kernel(x, y, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + o, tl.load(x + o))


@triton.jit
def powers_kernel(x, y, TIMES: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(x + o)
    for _ in range(TIMES):
        b_x = tl.exp2(b_x)
    tl.store(y + o, b_x)


@triton.jit
def product_kernel(a, b, y, N: tl.constexpr, K: tl.constexpr, M: tl.constexpr, BLOCK_N: tl.constexpr):
    # rows of a (rows, K) times b (K, N)
    o_m = tl.program_id(0) * M + tl.arange(0, M)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    b_y = tl.zeros((M, BLOCK_N), dtype=tl.float32)
    for i_k in range(0, K, 64):
        o_k = i_k + tl.arange(0, 64)
        b_y = tl.dot(tl.load(a + o_m[:, None] * K + o_k[None, :]), tl.load(b + o_k[:, None] * N + o_n[None, :]), b_y)
    tl.store(y + o_m[:, None] * N + o_n[None, :], b_y.to(tl.bfloat16))


@triton.jit
def rare_kernel(x, y, TIMES: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    b_x = tl.load(x + o)
    if tl.sum(b_x, axis=0) > 1e30:
        for _ in range(TIMES):
            b_x = tl.exp2(b_x)
    tl.store(y + o, b_x)


def on_meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def counted(kernel, grid, *arguments, **meta):
    launch = Launch(kernel, grid, arguments, meta, Work(1))
    return bound.count_launch(ahead_of_time.compiled(launch), launch)


def bound_of(kernel, grid, *arguments, work, **meta):
    launch = Launch(kernel, grid, arguments, meta, work)
    return bound.bound_of_kernel(ahead_of_time.compiled(launch), launch, predict.H100)


@pytest.mark.parametrize("rows", [1, 5, 64])
def test_every_trip_of_nested_loops_is_counted(rows):
    programs, columns, block = 3, 1024, 256
    x, y = on_meta(programs * rows, columns), on_meta(programs, block)
    found = counted(sum_kernel, (programs,), x, y, rows, COLUMNS=columns, BLOCK=block, num_warps=2)
    assert found.sectors * 32 == 4 * (rows * columns + block)  # every value once
    loads = sum(times for name, (_, times, _) in found.by_name.items() if name.startswith("LDG"))
    widths = {re.search(r"\d+", name)[0] for name in found.by_name if name.startswith("LDG")}
    assert widths == {"128"}
    assert loads == rows * columns / (32 * 4)
    sums = sum(times for name, (_, times, _) in found.by_name.items() if name.startswith("FADD"))
    assert sums == rows * columns / 32
    assert found.assumed == 0


def test_a_copy_is_bound_by_bytes():
    x, y = on_meta(1 << 26, dtype=torch.bfloat16), on_meta(1 << 26, dtype=torch.bfloat16)
    size = 2 * x.numel() * 2
    found = bound_of(copy_kernel, (x.numel() // 4096,), x, y, BLOCK=4096, work=Work(size))
    assert found.binds == "bytes"
    assert found.seconds == size / predict.H100.bytes > found.issue_s > 0


def test_special_functions_take_eight_cycles():
    x, y = on_meta(1 << 20), on_meta(1 << 20)
    arguments = dict(TIMES=64, BLOCK=1024, num_warps=4)
    found = counted(powers_kernel, (1024,), x, y, **arguments)
    pipe, times, cycles = found.by_name["MUFU.EX2"]
    assert (pipe, times, cycles) == ("special", 64 * 1024 / 32, 8 * 64 * 1024 / 32)
    found = bound_of(powers_kernel, (1024,), x, y, work=Work(8 << 20), **arguments)
    assert (found.binds, found.pipe) == ("issue", "special")
    assert found.issue_s == pytest.approx(8 * cycles / 4 / predict.H100.clock)  # the busiest has 8 of 1024 blocks


def test_a_product_is_bound_by_matrix_work():
    rows, n, k = 132 * 128, 256, 4096
    a, b, y = (on_meta(*shape, dtype=torch.bfloat16) for shape in ((rows, k), (k, n), (rows, n)))
    meta = dict(N=n, K=k, M=128, BLOCK_N=256, num_warps=8, num_stages=3)
    found = counted(product_kernel, (132, 1), a, b, y, **meta)
    assert found.products == 128 * n * k
    assert any(name.startswith("HGMMA") for name in found.by_name)
    found = bound_of(product_kernel, (132, 1), a, b, y, work=Work(1), **meta)
    assert found.binds == "matrix"
    assert found.blocks_per_sm == 1 and found.waves == 1
    assert found.seconds == pytest.approx(2 * rows * n * k / predict.H100.matrix)


def test_what_hangs_on_loaded_values_is_rare_and_told():
    arguments = on_meta(1024), on_meta(1024)
    short, long = (counted(rare_kernel, (1,), *arguments, TIMES=times, BLOCK=1024) for times in (8, 80))
    assert short.assumed == long.assumed == 1
    assert short.pipes["issue"] == long.pipes["issue"]


def stored_by(launch):
    """{parameter: addresses of bytes, of all blocks and warps} of a launch's stores."""
    kernel = ahead_of_time.compiled(launch)
    code, arguments = sass.disassemble(kernel.asm["cubin"]), ahead_of_time.arguments_of(launch)
    parameters = bound.parameters_of(kernel.asm["ptx"], arguments)
    found = []
    for block in range(launch.grid[0]):
        for index in range(launch.meta["num_warps"]):
            threads = 32 * launch.meta["num_warps"]
            trace = warp.Warp(code, parameters, (block, 0, 0), index, threads, (*launch.grid, 1, 1)).follow(True)
            for _, addresses, width in trace.stores:
                found += [address + byte for address in addresses.tolist() for byte in range(width)]
    return sorted(found)


@pytest.mark.parametrize(
    "kernel",
    ["pointwise_fwd", *(pytest.param(k, marks=pytest.mark.slow) for k in ("leffn_project_fwd", "attention_layer_fwd"))],
)
def test_the_machine_code_stores_every_value_once(kernel):
    """Addresses are what the instructions compute: a wrong one, or a wrong way, would leave a gap in the output."""
    launches = predict.recorded(predict.forward_of("ipt_v2_small", 1, 24))
    launch = next(each for each in launches if each.kernel and each.kernel.__name__ == f"{kernel}_kernel")
    outputs = [a for a in launch.arguments if isinstance(a, torch.Tensor)][-1]
    found = stored_by(launch)
    assert len(found) == outputs.numel() * outputs.element_size()
    assert found == list(range(found[0], found[0] + len(found)))


def test_launches_are_recorded_without_memory_and_without_running():
    forward = predict.recorded(predict.forward_of("ipt_v2_tiny", 1, 64))
    training = predict.recorded(predict.training_of("ipt_v2_tiny", 2, 64))
    names = {launch.kernel.__name__ for launch in training if launch.kernel}
    assert {launch.kernel.__name__ for launch in forward if launch.kernel} - names == set()
    assert any("bwd" in name for name in names)
    assert all(a.is_meta for launch in training for a in launch.arguments if isinstance(a, torch.Tensor))
    assert any(launch.kernel is None and launch.meta for launch in forward)  # a convolution of PyTorch's


def test_bounds_are_in_order_and_add_up():
    launches = predict.recorded(predict.forward_of("ipt_v2_tiny", 1, 32))
    pointwise = [each for each in launches if each.kernel is None or "pointwise" in each.kernel.__name__][:4]
    found = bound.bounds(pointwise, predict.H100, processes=1)
    assert [each.name for each in found] == [predict._name(launch) for launch in pointwise]
    for each in found:
        assert each.seconds == max(each.issue_s, each.bytes_s, each.matrix_s) <= each.estimate
    slow = bound.bounds(pointwise, predict.Ceilings(bytes=1e9, matrix=798e12))
    assert all(each.binds == "bytes" for each in slow)
    assert predict.table(pointwise, found)[1].endswith(tuple("0123456789"))
