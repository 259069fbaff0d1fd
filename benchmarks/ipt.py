"""``python -m benchmarks.ipt``: IPT on this CPU beside the released implementation in plain PyTorch.

The rival is spandrel's copy of the released code (a test-only package, see CONTRIBUTING.md). Contenders are timed in
turns; rows go to benchmarks/results/ipt_cpu.csv, peak memory of a layer's training to cpu_footprint.csv.
"""

import argparse
import copy
import pathlib
import statistics
import subprocess
import sys

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import ipt_fast
from benchmarks import footprint, measure, results
from benchmarks.roofline import Work
from ipt_fast.modules.transformer import DecoderLayer, EncoderLayer, attend_as_a_grid
from ipt_fast.tiling import procedure_tiles
from tests.oracles.public import public_module

PATH = results.FOLDER / "ipt_cpu.csv"
RELEASED = "spandrel.architectures.IPT.__arch.ipt"
LAYER_TILES = 16


def released_tiles(length, tile=48):
    """Tiles that the released procedure runs for a square image, those of its four border strips again."""
    inner = (length - tile) // (tile // 4) + 1
    return inner**2 + 4 * inner + 1


def medians(calls, rounds):
    """{name: median seconds} of calls in turns, after one round that does not count."""
    times = [{name: measure.seconds(call) for name, call in calls.items()} for _ in range(rounds + 1)][1:]
    return {name: statistics.median(each[name] for each in times) for name in calls}


def models(dtype):
    """Ours and the released one with the same weights."""
    torch.manual_seed(0)
    ours = ipt_fast.create_model("ipt").eval()
    released = public_module(RELEASED).IPT().eval()
    released.load_state_dict(ours.state_dict())
    ours = ours.requires_grad_(False).to(dtype=dtype, memory_format=torch.channels_last)
    return ours, released.requires_grad_(False).to(dtype)


def whole_model(dtype_name, tiles, rounds, path):
    dtype = measure.DTYPES[dtype_name]
    ours, released = models(dtype)
    x = (torch.rand(tiles, 3, 48, 48) * 255).to(dtype)
    with torch.inference_mode():
        exact = copy.deepcopy(ours).double()(x[:2].double())
        errors = [measure.relative_error(model(x[:2]), exact) for model in (ours, released)]
        assert errors[0] <= max(2 * errors[1], measure.FLOOR_ULPS * torch.finfo(dtype).eps), errors
        with FlopCounterMode(display=False) as counter:
            ours(x[:1])
        calls = {
            "ipt_fast": lambda: ours(x),
            "eager": lambda: released(x),
            "eager by 16": lambda: [released(part) for part in x.split(16)],  # as ipt_fast does by itself
        }
        found = medians(calls, rounds)
    flops, size = counter.get_total_flops() * tiles, sum(p.numel() for p in ours.parameters()) * dtype.itemsize
    results.append_medians(path, f"ipt {tiles}x3x48x48", dtype_name, "forward", found, Work(flops, size))
    for name, value in found.items():
        print(f"{dtype_name:9} {name:11} {value / tiles * 1e3:7.1f} ms a tile")
    rival = min(found["eager"], found["eager by 16"])
    print(f"{dtype_name:9} {rival / found['ipt_fast']:.2f} times as fast as the faster eager", flush=True)
    return {"ipt_fast": found["ipt_fast"] / tiles, "eager": rival / tiles}


def image(a_tile, path, length=512):
    """The time of an image from that of a tile: counted, as the released procedure takes a quarter of an hour."""
    counts = {"ipt_fast": len(procedure_tiles("blend", length, 48)) ** 2, "eager": released_tiles(length)}
    found = {name: counts[name] * value for name, value in a_tile.items()}
    results.append_medians(path, f"ipt {length}x{length}, counted", "float32", "forward", found, Work(1, 1))
    ratio = found["eager"] / found["ipt_fast"]
    print(
        f"{length} x {length}: {counts['ipt_fast']} tiles for {counts['eager']}: {ratio:.1f} times as fast", flush=True
    )


def attention(dtype_name, rounds, path):
    """SDPA beside the library's own core for grids, with all tokens as one grid: the body takes the faster one."""
    heads, dim, side = 12, 576, 16
    qkv = torch.randn(LAYER_TILES, side**2, 3 * dim, dtype=measure.DTYPES[dtype_name])

    def sdpa(qkv):
        q, k, v = (each.unflatten(2, (heads, -1)).transpose(1, 2) for each in qkv.chunk(3, dim=2))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    functions = {"sdpa": sdpa, "grid core": lambda qkv: attend_as_a_grid(qkv, heads)}
    work = Work(4 * LAYER_TILES * side**4 * dim, 4 * LAYER_TILES * side**2 * dim * qkv.element_size())
    case = f"ipt attention {LAYER_TILES}x{side**2}x{dim}"
    for direction, wrapped, times in (
        ("forward", measure.without_backward, 1),
        ("training", measure.with_backward, 3),
    ):
        found = medians({name: wrapped(each, [qkv], {}) for name, each in functions.items()}, rounds)
        results.append_medians(path, case, dtype_name, direction, found, work * times)
        ratio = found["grid core"] / found["sdpa"]
        print(f"attention {dtype_name} {direction}: grid core takes {ratio:.2f} of the time of SDPA", flush=True)


def layers(contender):
    """An encoder and a decoder layer, and their input: (modules, call)."""
    torch.manual_seed(0)
    if contender == "ipt_fast":
        encoder, decoder = EncoderLayer(576, 12), DecoderLayer(576, 12)
        x, task = torch.randn(LAYER_TILES, 256, 576), torch.randn(256, 576)

        def forward():
            memory = encoder(x)
            return decoder(memory, memory, task)
    else:
        released = public_module(RELEASED)
        encoder = released.TransformerEncoderLayer(576, 12, 2304, 0.0)
        decoder = released.TransformerDecoderLayer(576, 12, 2304, 0.0)
        x, task = torch.randn(256, LAYER_TILES, 576), torch.randn(256, 1, 576).expand(-1, LAYER_TILES, -1)

        def forward():
            memory = encoder(x)
            return decoder(memory, memory, query_pos=task)

    def step():
        for module in (encoder, decoder):
            module.zero_grad()
        forward().square().mean().backward()

    return step


def layer_training(rounds, path):
    steps = {name: layers(name) for name in ("ipt_fast", "eager")}
    found = medians(steps, rounds)
    tokens = LAYER_TILES * 256
    flops = 3 * tokens * (2 * 28 * 576**2 + 3 * 4 * 256 * 576)
    results.append_medians(path, "ipt layers 16x256x576", "float32", "training", found, Work(flops, 28 * 576**2 * 4))
    print(f"layers: {found['eager'] / found['ipt_fast']:.2f} times as fast as eager", flush=True)


def layer_peak(contender):
    """GiB that a training step of an encoder and a decoder layer takes above what the process held before."""
    step = layers(contender)
    before = footprint.memory("VmRSS")
    step()
    return (footprint.memory("VmHWM") - before) / footprint.GIB


def layer_memory():
    rows = results.read(footprint.PATH)
    for contender in ("ipt_fast", "eager"):
        command = [sys.executable, "-m", "benchmarks.ipt", "--layer-peak", contender]
        value = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        row = {"quantity": "layer_peak", "model": "ipt", "dtype": "float32", "arguments": contender}
        rows.append({**results.environment(), **row, "value": f"{value:.4g}", "unit": "GiB"})
        print(f"layer_peak {contender:9} {value:.3f} GiB", flush=True)
    results.write(footprint.PATH, rows)


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ipt", description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=PATH, help="the CSV that rows are added to")
    parser.add_argument("--tiles", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layer-peak", help=argparse.SUPPRESS)
    parser.add_argument("--layers", action="store_true", help="only the training of layers")
    args = parser.parse_args()
    if args.layer_peak:
        print(layer_peak(args.layer_peak))
        return
    if args.layers:
        layer_training(2 * args.rounds + 1, args.out)
        return
    a_tile = whole_model("float32", args.tiles, args.rounds, args.out)
    image(a_tile, args.out)
    whole_model("bfloat16", args.tiles, args.rounds, args.out)
    # In a process of its own: what ran before decides how the allocator gets memory.
    options = ["--layers", "--rounds", str(args.rounds), "--out", str(args.out)]
    subprocess.run([sys.executable, "-m", "benchmarks.ipt", *options], check=True)
    for dtype_name in measure.DTYPES:
        attention(dtype_name, 5 * args.rounds, args.out)
    layer_memory()


if __name__ == "__main__":
    main()
