"""``python -m benchmarks.profile``: where the time of layers and models goes on this CPU, part by part.

A model's time is told by operator, as torch.profiler sees them. Within the fused layers, whose parts are inlined into
one another, the program counter is sampled (by ``perf record``) and every sample is given to the source file that it
stems from. That takes a build with line numbers, which computes the same by the same instructions::

    IPT_FAST_BUILD=cpu CXXFLAGS=-g python setup.py -q build --build-lib build/profile

Rows go to benchmarks/results/cpu_profile.csv, from where ``python -m benchmarks.performance`` takes them.
"""

import argparse
import collections
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import tempfile

import torch

import ipt_fast
from benchmarks import measure, registry, results, roofline
from benchmarks.test_models import work_of

ROOT = pathlib.Path(__file__).parents[1]
PATH = results.FOLDER / "cpu_profile.csv"
BUILD = ROOT / "build/profile"
MODELS = [("ipt_v2_small", 256), ("ipt_v2_small", 64), ("ipt_v2_base", 256)]
# {part: source files and functions}; a sample in several, one inlined into another, is of the first part here.
PARTS = {
    "GELU": ("gelu.h",),
    "softmax": ("softmax.h",),
    "depthwise": ("depthwise.h", "depthwise_rows"),
    "Gram": ("gram.h",),
    "attention": ("window_attend.h", "lattice_attend.h"),
    "products": ("gemm.h", "matrix.h", "units.h", "matrix_unit."),
    "norm": ("rows.h", "layer_norm_2d_kernel.h", "layer_norm_2d_kernel.cpp"),
}
LIBRARIES = {"libgomp": "waiting for threads", "libpython": "Python", "libtorch": "PyTorch", "libc10": "PyTorch"}


def part_of(frames):
    """The part that code belongs to; ``frames`` are the functions inlined there, "function file" each."""
    return next(
        (part for part, names in PARTS.items() if any(name in frame for name in names for frame in frames)),
        "rest of the kernel",
    )


def inlined(library, addresses):
    """{address: the functions inlined there, "function file" each, the innermost first}."""
    command = ["addr2line", "-a", "-f", "-i", "-e", str(library)]
    text = "\n".join(map(hex, addresses))
    out = subprocess.run(command, input=text, check=True, capture_output=True, text=True).stdout
    found = {}
    for address, frames in re.findall(r"(0x[0-9a-f]+)\n((?:(?!0x).*\n)*)", out):
        lines = frames.splitlines()
        files = [pathlib.Path(line.rpartition(":")[0]).name for line in lines[1::2]]
        found[int(address, 16)] = [f"{name} {file}" for name, file in zip(lines[::2], files, strict=True)]
    return found


def _offset_of_code(library):
    """What has to be added to an offset in the file of ``library`` for the address that its code was linked for."""
    headers = subprocess.run(["readelf", "-lW", str(library)], check=True, capture_output=True, text=True).stdout
    offset, address = re.search(r"LOAD\s+(0x\w+) (0x\w+) \S+ \S+ \S+ R E", headers).groups()
    return int(address, 16) - int(offset, 16)


def parts(samples):
    """{part: share of the samples} of what ``perf script --show-mmap-events -F ip,dso`` printed."""
    counts, starts, ours = collections.Counter(), {}, collections.Counter()
    for line in samples.splitlines():
        if "PERF_RECORD_MMAP" in line:
            if found := re.search(r"\[(0x\w+)\(0x\w+\) @ (0x\w+|0) .*: r-xp (\S*/ipt_fast/_C\.\S+)", line):
                starts[found[3]] = int(found[1], 16) - int(found[2], 16)
        elif found := re.match(r"\s*([0-9a-f]+) \((.*)\)$", line):
            if found[2] in starts:
                ours[found[2], int(found[1], 16) - starts[found[2]]] += 1
            else:
                name = pathlib.Path(found[2]).name
                counts[next((part for key, part in LIBRARIES.items() if name.startswith(key)), "system")] += 1
    for library in starts:
        move = _offset_of_code(library)
        places = {offset + move: count for (of, offset), count in ours.items() if of == library}
        for address, frames in inlined(library, places).items():
            counts[part_of(frames)] += places[address]
    return {part: count / counts.total() for part, count in counts.most_common()}


def sampled(case, dtype_name, library, seconds):
    """(median seconds of a call on one thread, {part: share of the time}) of a forward in a process of its own."""
    command = [sys.executable, "-P", "-m", "benchmarks.profile", "--run", case.name, dtype_name]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(library), str(ROOT)])}
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process,
    ):
        median, record = float(process.stdout.readline()), f"{folder}/perf.data"
        options = ["-q", "-e", "cpu-clock", "-F", "997", "-o", record, "-p", str(process.pid)]
        subprocess.run(["perf", "record", *options, "--", "sleep", str(seconds)], check=True)
        process.kill()
        script = ["perf", "script", "-i", record, "--show-mmap-events", "-F", "ip,dso"]
        return median, parts(subprocess.run(script, check=True, capture_output=True, text=True).stdout)


def run(name, dtype_name):
    """Call a case until the end of the process; the median of the first calls is printed."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    case = next(case for case in registry.LAYERS if case.name == name)
    call = measure.without_backward(case.ours, case.inputs(measure.DTYPES[dtype_name]), case.keywords)
    print(statistics.median(measure.seconds(call) for _ in range(7)), flush=True)
    while True:
        call()


def model_operators(name, size, dtype_name, rounds=3):
    """(seconds of a forward, {operator and shape: share of its time}, the model's work)."""
    torch.manual_seed(0)
    dtype = measure.DTYPES[dtype_name]
    model = ipt_fast.create_model(name, merged=True).eval().to(dtype=dtype, memory_format=torch.channels_last)
    x = torch.rand(1, 3, size, size, dtype=dtype)
    call = measure.without_backward(model, [x], {})
    call()
    median = statistics.median(measure.seconds(call) for _ in range(rounds))
    activities = [torch.profiler.ProfilerActivity.CPU]
    with (
        torch.profiler.profile(activities=activities, record_shapes=True) as profiler,
        torch.profiler.record_function("forward"),
    ):
        call()
    times, whole = collections.Counter(), 0.0
    for event in profiler.key_averages(group_by_input_shape=True):
        space, _, operator = event.key.partition("::")
        if space == "ipt_fast_cpu":
            times[f"{operator} {'x'.join(map(str, event.input_shapes[0]))}"] += event.cpu_time_total
        elif event.key == "aten::conv2d":
            times["convolutions"] += event.cpu_time_total
        elif event.key == "forward":
            whole = event.cpu_time_total
    shares = {part: time / whole for part, time in times.most_common()}
    shares["the rest"] = 1 - sum(shares.values())
    return median, shares, work_of(model, [x], dtype)


def rows_of(case, dtype_name, threads, median, shares, work):
    """Rows of one profile, one a part."""
    try:
        share = f"{roofline.rates(threads).seconds(work, measure.DTYPES[dtype_name]) / median:.3f}"
    except RuntimeError as error:
        print(error, file=sys.stderr)
        share = ""
    shared = {**results.environment(), "threads": threads, "kind": roofline.kind(), "case": case, "dtype": dtype_name}
    shared |= {"median_ms": f"{median * 1e3:.3f}", "share_of_roofline": share}
    return [{**shared, "part": part, "share": f"{value:.3f}"} for part, value in shares.items()]


def main():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.profile", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, default=PATH, help="the CSV that rows are added to")
    parser.add_argument("--select", default="", help="only cases whose name contains this")
    parser.add_argument("--library", type=pathlib.Path, default=BUILD, help="the build with line numbers")
    parser.add_argument("--seconds", type=float, default=2, help="how long to sample each layer")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        run(*args.run)
    needed = [name for name in ("perf", "addr2line", "readelf") if shutil.which(name) is None]
    if needed or not any(args.library.glob("ipt_fast/_C.*")):
        parser.error(f"{', '.join(needed) or args.library} must be there, see --help")
    found = results.read(args.out) if args.out.exists() else []
    layers = [case for case in registry.LAYERS if args.select in case.name]
    models = [(name, size) for name, size in MODELS if args.select in f"{name} 1x3x{size}x{size}"]
    for dtype_name, dtype in measure.DTYPES.items():
        for name, size in models:
            profile = model_operators(name, size, dtype_name)
            rows = rows_of(f"{name} 1x3x{size}x{size}", dtype_name, torch.get_num_threads(), *profile)
            found += show(rows)
            results.write(args.out, found)
        for case in layers:
            median, shares = sampled(case, dtype_name, args.library, args.seconds)
            found += show(rows_of(case.name, dtype_name, 1, median, shares, case.work(case.inputs(dtype))))
            results.write(args.out, found)


def show(rows):
    first = rows[0]
    print(f"{first['case']} {first['dtype']} {first['median_ms']} ms, {first['share_of_roofline']} of the roofline:")
    print("   ", ", ".join(f"{row['part']} {float(row['share']):.0%}" for row in rows), flush=True)
    return rows


if __name__ == "__main__":
    main()
