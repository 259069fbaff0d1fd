"""``python -m benchmarks.footprint``: peak memory, time per pixel by image size, time to a first result, and what a
sampler takes beyond its model.

Every figure comes from a process of its own, and goes as a row to benchmarks/results/cpu_footprint.csv.
"""

import argparse
import pathlib
import statistics
import subprocess
import sys
import time

import torch

import ipt_fast
from benchmarks import measure, relatives, results
from benchmarks.baseline import plain_eager
from benchmarks.relatives import INFERENCE, TRAINING
from ipt_fast.diffusion import sample

PATH = results.FOLDER / "cpu_footprint.csv"
GIB = 2**30
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def memory(field):
    """VmHWM (peak) or VmRSS (now) of this process in bytes."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")


def _model_and_image(name, dtype, batch, height, width, merged):
    torch.manual_seed(0)
    model = ipt_fast.create_model(name, merged=merged).to(dtype).to(memory_format=torch.channels_last)
    x = torch.rand(batch, 3, height, width, dtype=dtype).contiguous(memory_format=torch.channels_last)
    return model, x


def inference_peak(name, dtype, height, width):
    """GiB at the peak of a process that restores one image, whole."""
    model, x = _model_and_image(name, DTYPES[dtype], 1, int(height), int(width), merged=True)
    with torch.inference_mode():
        model(x)
    return memory("VmHWM") / GIB


def generator_inputs(batch):
    """Latents, timesteps and classes, as at 256 x 256 pixels."""
    draw = torch.Generator().manual_seed(0)
    latents = torch.randn(batch, 4, 32, 32, generator=draw)
    return latents, torch.randint(1000, (batch,), generator=draw), torch.randint(1000, (batch,), generator=draw)


def training_peak(name, dtype, contender):
    """GiB that a training step takes above what the process held before: of 2 images of 128 x 128, or 8 latents."""
    if name.startswith("latent"):
        torch.manual_seed(0)
        model, inputs = ipt_fast.create_model(name).to(memory_format=torch.channels_last), generator_inputs(8)
    else:
        model, x = _model_and_image(name, torch.float32, 2, 128, 128, merged=False)
        inputs = (x,)
    before = memory("VmRSS")

    def step():
        with torch.autocast("cpu", DTYPES[dtype], enabled=dtype != "float32"):
            loss = model(*inputs).square().mean()
        loss.backward()

    if contender == "eager":
        with plain_eager():
            step()
    else:
        step()
    return (memory("VmHWM") - before) / GIB


def relative_peak(name, dtype, contender, direction, size):
    """GiB that a call of somebody else's model takes above what the process held before: as it is, accelerated, or
    frozen, too, when the weights that its first call packs are counted."""
    model = relatives.plain(name).to(memory_format=torch.channels_last)
    training = direction == "training"
    model = model.train() if training else model.to(DTYPES[dtype])
    x = torch.rand(1, 3, int(size), int(size), dtype=torch.float32 if training else DTYPES[dtype])
    if contender != "eager":
        ipt_fast.accelerate(model, verify=False)
    if contender == "ipt_fast frozen":
        model = ipt_fast.freeze(model.eval())
    before = memory("VmRSS")
    if training:
        with torch.autocast("cpu", DTYPES[dtype], enabled=dtype != "float32"):
            loss = model(x).square().mean()
        loss.backward()
    else:
        with torch.inference_mode():
            model(x)
    return (memory("VmHWM") - before) / GIB


def time_per_pixel(name, dtype, size):
    """Nanoseconds a pixel, median of three (one for more than a million pixels)."""
    model, x = _model_and_image(name, DTYPES[dtype], 1, int(size), int(size), merged=True)
    with torch.inference_mode():
        model(x[..., :256, :256])
        rounds = 3 if int(size) ** 2 <= 2**20 else 1
        median = statistics.median(measure.seconds(lambda: model(x)) for _ in range(rounds))
    return median / int(size) ** 2 * 1e9


def first_result(name, dtype, size):
    """Seconds from the start of a process that imports the package to its first output."""
    program = (
        "import torch, ipt_fast\n"
        f"model = ipt_fast.create_model({name!r}, pretrained=True, merged=True).to(torch.{dtype})\n"
        f"with torch.inference_mode(): model(torch.rand(1, 3, {size}, {size}, dtype=torch.{dtype}))\n"
    )
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", program], check=True)
    return time.perf_counter() - start


def sampler_share(name, dtype, sampler, batch):
    """Percent of a frozen model's own time that the loop of a sampler takes beyond it, over 20 steps."""
    torch.manual_seed(0)
    model = ipt_fast.freeze(ipt_fast.create_model(name, merged=True), DTYPES[dtype])
    config, own = model.config, []

    class Timed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.config = config

        def forward(self, *inputs):
            start = time.perf_counter()
            out = model(*inputs)
            own.append(time.perf_counter() - start)
            return out

    timed, count = Timed().eval(), int(batch)
    sample(timed, [0] * count, seeds=range(count), sampler=sampler, steps=2)  # warm-up
    own.clear()
    total = measure.seconds(lambda: sample(timed, [0] * count, seeds=range(count), sampler=sampler, steps=20))
    return (total - sum(own)) / sum(own) * 100


QUANTITIES = {
    "inference_peak": "GiB",
    "training_peak": "GiB",
    "relative_peak": "GiB",
    "time_per_pixel": "ns",
    "first_result": "s",
    "sampler_share": "%",
}
RUNS = [
    *(("first_result", "ipt_v2_tiny", dtype, "256") for dtype in DTYPES),
    *(("training_peak", "ipt_v2_small", dtype, who) for dtype in DTYPES for who in ("ipt_fast", "eager")),
    *(("training_peak", "latent_ipt_v2_s", dtype, who) for dtype in DTYPES for who in ("ipt_fast", "eager")),
    *(("sampler_share", "latent_ipt_v2_s", dtype, sampler, "8") for dtype in DTYPES for sampler in ("ddpm", "ddim")),
    *(("time_per_pixel", "ipt_v2_small", dtype, size) for dtype in DTYPES for size in ("256", "512", "1024", "2048")),
    *(("inference_peak", "ipt_v2_small", dtype, "2160", "3840") for dtype in DTYPES),
    *(
        ("relative_peak", name, dtype, who, direction, str(size))
        for direction, cases in (("forward", INFERENCE), ("training", TRAINING))
        for name, *_, size in cases
        for dtype in DTYPES
        for who in ("ipt_fast", "ipt_fast frozen", "eager")
        if direction == "forward" or who != "ipt_fast frozen"
    ),
]


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.footprint", description=" ".join(__doc__.split()))
    parser.add_argument("--out", type=pathlib.Path, default=PATH, help="the CSV that rows are added to")
    parser.add_argument("--select", default="", help="only the quantities whose name contains this")
    parser.add_argument("--model", default="", help="only the models whose name contains this")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        quantity, *arguments = args.measure
        print(globals()[quantity](*arguments))
        return
    rows = results.read(args.out) if args.out.exists() else []
    for run in RUNS:
        if args.select not in run[0] or args.model not in run[1]:
            continue
        command = [sys.executable, "-m", "benchmarks.footprint", "--measure", *run]
        quantity, model, dtype, *arguments = run
        process = subprocess.run(command, capture_output=True, text=True)
        if process.returncode:  # as SwinIR's own code in bfloat16
            print(f"{' '.join(run)} does not run: {process.stderr.strip().splitlines()[-1]}", flush=True)
            continue
        value = float(process.stdout)
        print(
            f"{quantity:16} {model} {dtype:9} {' '.join(arguments):12} {value:.3f} {QUANTITIES[quantity]}", flush=True
        )
        row = {"quantity": quantity, "model": model, "dtype": dtype, "arguments": " ".join(arguments)}
        rows.append({**results.environment(), **row, "value": f"{value:.4g}", "unit": QUANTITIES[quantity]})
        results.write(args.out, rows)


if __name__ == "__main__":
    main()
