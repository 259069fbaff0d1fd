"""``python -m benchmarks.performance``: docs/performance.md, and README's rows and chart, from benchmarks/results."""

import pathlib

from benchmarks import plot, results, table
from benchmarks.relatives import MODELS as MODELS_OF_OTHERS
from ipt_fast._files import atomic_write

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs/performance.md"
CHART = ROOT / "docs/speed.png"
README = ROOT / "README.md"
QUALITY = results.FOLDER / "quality.csv"

# The README's rows: file of the results, case, dtype, direction.
HEADLINE = (
    ("cpu", "ipt_v2_small 1x3x256x256", "float32", "forward"),
    ("cpu", "ipt_v2_small 2x3x128x128", "float32", "training"),
    ("cpu", "latent_ipt_v2_s 8x4x32x32", "float32", "forward"),
    ("cpu", "restormer 1x3x256x256", "float32", "forward"),
    ("cpu", "swinir_light x2 1x3x128x128", "float32", "forward"),
    ("cpu", "hat x2 1x3x64x64", "float32", "forward"),
    ("ipt_cpu", "ipt 64x3x48x48", "float32", "forward"),
    ("gpu_models", "ipt_v2_base 1x3x512x512", "bfloat16", "forward"),
)

MODELS = ("ipt_v2", "latent_ipt_v2")  # how their cases begin
OTHERS = tuple(f"{name} 1x3x" for name in MODELS_OF_OTHERS) + tuple(f"{name} 2x3x" for name in MODELS_OF_OTHERS)

INTRODUCTION = """# What was measured

This page is made by `python -m benchmarks.performance` from the rows in `benchmarks/results`; a test compares them.
Speed is that of the whole call, outputs equal to plain PyTorch's within the rule of the tests. A row names its run: the
day and the commit. Of each case the last run that measured it counts, so that rows may be of different commits.
"""

CPU_NOTES = """\
Rivals compute in the same dtype. Plain PyTorch: eager, channels-last and NCHW; its own layer norm ("native");
`scaled_dot_product_attention` ("sdpa"); and torch.compile ("compiled", and with weights frozen "compiled frozen"; rows
of 2026-11-21 call the latter of models "compiled"). It takes 4 to 12 minutes to compile, so not every row has it. Other
runtimes, in inference: OpenVINO (its precision and latency hints given, for one size and for any, "dynamic") and ONNX
Runtime, which has no bfloat16. Rows with different rivals cannot be compared. All contenders take
turns in one process, and a time is the median of several rounds. A ratio below 1 means slower. The roofline is told
below; rows of 2026-11-21 have none. "tuned" is a process in
which glibc keeps large blocks of memory (`TUNED_ALLOCATOR` in benchmarks/measure.py).
"""

OTHERS_NOTES = """\
Published models as their projects compute them (from spandrel, random weights), and after `ipt_fast.accelerate`
(`pytest benchmarks/test_relatives.py`). Where a project's code fails in bfloat16, plain PyTorch runs by autocast. Sizes
are of the low-resolution image.
"""

PROFILE_NOTES = """\
A forward by parts (`python -m benchmarks.profile`): layers on one thread, by samples of where the processor is; models
on all threads, by operator. The roofline is the least time that the rates of the processor allow, which are measured:
matrix products at the rate of its widest multiply-add (in bfloat16 of its products of bfloat16), depthwise convolutions
as float32, and every tensor copied once. "products" are the projections of attention and both products of the
feed-forward network, "attention" is what mixes values by a Gram matrix or the scores of a grid.
"""

IPT_NOTES = """\
IPT beside the released code in plain PyTorch (`python -m benchmarks.ipt`). The time of a 512 x 512 image is counted
from that of a tile: 196 tiles blended, against the 1678 that the released program runs. ipt_fast gets 64 tiles in one
call and takes 16 at a time. The released code is timed with 64 and with 16 ("eager by 16"). "ipt layers" is a training
step of an encoder and a decoder layer. It is made of matrix products, which are the same for both, so little is left to
win where the allocator costs nothing.
"""

GPU_NOTES = """\
Models run as CUDA graphs unless a column says otherwise. "mixed" is what "auto" chooses, "tuned" is Triton with the
tiles of `kernels/configs`, and "triton" is Triton with default tiles. A dash was not measured. [gpu.md](gpu.md) tells
how the check works and what the bounds are.
"""

QUALITY_NOTES = """\
`python -m benchmarks.quality` measures the models of IPT-V2, in float32; the weights ship with the package. σ is the
level of Gaussian noise; a dash means a set that has its own inputs. Of CC15 and GoPro the images are parts (MANIFEST of
the data); by PolyU the model of camera noise was chosen, so its figure there is no test.
"""


def headline_rows():
    """What README shows: [(kind, case, dtype, direction, milliseconds of the best rival, its name, of ipt_fast)]."""
    return [_headline_row(*wanted) for wanted in HEADLINE]


def _headline_row(name, case, dtype, direction):
    """Of several runs the one that we are least ahead in: not all had the same rivals."""
    rows = results.read(results.FOLDER / f"{name}.csv")
    ours = "mixed" if name == "gpu_models" else "ipt_fast"
    if name == "gpu_models":
        rows = [{**row, "case": f"{row['model']} {row['shape']}"} for row in rows if not row["note"]]
    else:
        rows = [row for row in rows if row["allocator"] == "default"]
    rows = [row for row in rows if (row["case"], row["dtype"], row["direction"]) == (case, dtype, direction)]
    runs = [_beside_best_rival(row, rows) for row in rows if row["contender"] == ours]
    row, best = min(runs, key=lambda run: _milliseconds(run[1]) / _milliseconds(run[0]))
    return table.kind_of(row), case, dtype, direction, _milliseconds(best), best["contender"], _milliseconds(row)


def _beside_best_rival(row, rows):
    """(ours, the best rival of the same run)."""
    rivals = [
        other
        for other in rows
        if not results.is_ours(other["contender"])
        and other["contender"] not in ("mixed", "tuned", "triton", "cuda")
        and all(other[column] == row[column] for column in table.RUN)
    ]
    return row, min(rivals, key=_milliseconds)


def _milliseconds(row):
    return float(row["median_ms"])


def headline():
    """README's table of speed."""
    lines = [
        [kind, case, dtype, direction, f"{table.time(theirs)} ({best})", table.time(ours), f"**{theirs / ours:.1f}**"]
        for kind, case, dtype, direction, theirs, best, ours in headline_rows()
    ]
    names = ("processor", "model and input", "dtype", "pass", "best rival", "ipt_fast", "times faster")
    return table.table(names, lines)


def quality():
    """README's sentence on what the shipped denoiser gains."""
    row = next(
        row
        for row in results.read(QUALITY)
        if (row["model"], row["dataset"], row["sigma"]) == ("ipt_v2_tiny", "CBSD68", "25")
    )
    return f"from {float(row['psnr_input']):.1f} to {float(row['psnr_output']):.1f} dB"


def _by_kind(name):
    """{kind of processor or card: its rows} of a file of results."""
    kinds = {}
    for row in results.read(results.FOLDER / f"{name}.csv"):
        kinds.setdefault(table.kind_of(row), []).append(row)
    return kinds


def page():
    """The text of docs/performance.md."""
    cpu, ipt, footprint = (_by_kind(name) for name in ("cpu", "ipt_cpu", "cpu_footprint"))
    parts = [INTRODUCTION]
    for kind in dict.fromkeys((*cpu, *ipt, *footprint)):
        parts.append(f"## {kind}\n")
        if kind in cpu:
            models = [row for row in cpu[kind] if row["case"].startswith(MODELS)]
            others = [row for row in cpu[kind] if row["case"].startswith(OTHERS)]
            operators = [row for row in cpu[kind] if not row["case"].startswith(MODELS + OTHERS)]
            parts += [CPU_NOTES, "### Models\n", table.speed(models), ""]
            if others:
                parts += ["### Other people's models, accelerated\n", OTHERS_NOTES, table.speed(others), ""]
            parts += ["### Operators\n", table.speed(operators), ""]
        if kind in ipt:
            parts += ["### IPT\n", IPT_NOTES, table.speed(ipt[kind]), ""]
        if kind in footprint:
            parts += ["### Memory and time by size\n", "Every figure is from a process of its own.\n"]
            parts += [table.footprint(footprint[kind]), ""]
    if (results.FOLDER / "cpu_profile.csv").exists():
        rows = results.read(results.FOLDER / "cpu_profile.csv")
        parts.append("## Where the time goes on CPUs\n")
        for kind in dict.fromkeys((row["cpu"], row["kind"]) for row in rows):
            of_kind = [row for row in rows if (row["cpu"], row["kind"]) == kind]
            parts += [f"### {' '.join(kind)}\n", PROFILE_NOTES, table.profile(of_kind), ""]
    models, kernels = _by_kind("gpu_models"), _by_kind("gpu_kernels")
    for kind in models:
        parts += [f"## {kind}\n", GPU_NOTES, "### Models\n", table.gpu_models(models[kind]), ""]
        parts += ["### Operators\n", table.gpu_operators(kernels[kind]), ""]
        parts += ["### Launches beside their bounds\n", table.gpu_launches(kernels[kind]), ""]
    parts += ["## Quality of the models that ship\n", QUALITY_NOTES]
    parts += [
        table.quality(results.read(QUALITY)),
        "",
        "`ipt_tiny`, by the protocol of each task's tables:\n",
        table.ipt_restoration(),
        "",
    ]
    return "\n".join(parts)


def main():
    """Write the page and the chart, and the table into README."""
    with atomic_write(PAGE) as temporary:
        temporary.write_text(page())
    plot.draw_headline(headline_rows(), CHART)
    before, _, after = README.read_text().partition("| processor |")
    with atomic_write(README) as temporary:
        temporary.write_text(before + headline() + after[after.index("\n\n") :])


if __name__ == "__main__":
    main()
