"""Rows of benchmarks/results as tables in Markdown, in units that people read."""

from benchmarks import results

RUN = ("date", "commit")  # which run a row is of


def newest(rows, *key):
    """{values of the columns ``key``: row}, later rows replacing earlier ones."""
    return {tuple(row[column] for column in key): row for row in rows}


def table(names, rows):
    """A Markdown table with the columns ``names``."""
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def time(milliseconds):
    """A time with three digits that count, in µs, ms or s."""
    value = float(milliseconds)
    for unit, factor in (("µs", 1e-3), ("ms", 1.0), ("s", 1e3)):
        if value < 1000 * factor or unit == "s":
            return f"{_three_digits(value / factor)} {unit}"


def memory(gib):
    """Memory in MiB or GiB."""
    return f"{1024 * float(gib):.0f} MiB" if float(gib) < 1 else f"{float(gib):.1f} GiB"


def _three_digits(value):
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def measured(row):
    """When a row was measured, and with which commit."""
    return f"{row['date'][:10]}, {row['commit']}"


def kind_of(row):
    """The kind of processor or card that a row was measured on."""
    if "gpu" in row:
        return row["gpu"]
    name = row["cpu"].replace("(R)", "").replace("(TM)", "").replace(" Processor", "").replace(" CPU", "")
    capability, level = row["isa"].split("/")
    units = {"AVX512": "AVX-512", "AVX2": "AVX2"}.get(capability, capability)
    kind = row.get("kind") or level  # rows of 2026-11-21 have none
    units += {"amx": " and AMX", "avx512_bf16": " with bfloat16"}.get(kind, "")
    return f"{name}, {units}, {row['threads']} cores"


def rivals_of(ours, rows, key):
    """{name: milliseconds} of what was timed in the run of the row ``ours``, beside it."""
    same = (*RUN, *key)
    return {
        row["contender"]: float(row["median_ms"])
        for row in rows
        if not results.is_ours(row["contender"]) and all(row[column] == ours[column] for column in same)
    }


SPEED_KEY = ("cpu", "isa", "allocator", "case", "dtype", "direction")


def speed(rows):
    """Each case on a CPU beside the best rival; of every case the last run that measured it."""
    ours = newest((row for row in rows if results.is_ours(row["contender"])), *SPEED_KEY, "contender")
    names = ("case", "dtype", "direction", "process", "best rival", "ipt_fast", "times faster", "of the roofline")
    lines = []
    for row in ours.values():
        rivals = rivals_of(row, rows, SPEED_KEY)
        best = min(rivals, key=rivals.get)
        form = row["contender"].removeprefix("ipt_fast")
        cells = [row[name] for name in ("case", "dtype", "direction", "allocator")]
        cells += [
            f"{time(rivals[best])} ({best})",
            f"{time(row['median_ms'])}{f' ({form.strip()})' if form else ''}",
            f"**{rivals[best] / float(row['median_ms']):.2f}**",
            percent(row.get("share_of_roofline")),
        ]
        lines.append([*cells, ", ".join(rivals), measured(row)])
    return table((*names, "rivals", "run"), lines)


def percent(share):
    """A share in percent; a dash where it was not measured."""
    return f"{float(share):.0%}" if share else "-"


def profile(rows):
    """Where the time of a forward goes: one line a layer or model, parts by their share of the time."""
    cases = {}
    for row in rows:
        parts = cases.setdefault((row["cpu"], row["case"], row["dtype"]), {}).setdefault(
            (row["date"], row["commit"]), {}
        )
        parts[row["part"]] = row
    lines = []
    for runs in cases.values():
        row, *others = list(runs.values())[-1].values()
        shares = [f"{each['part']} {percent(each['share'])}" for each in (row, *others) if float(each["share"]) >= 0.01]
        cells = [row["case"], row["dtype"], row["threads"], time(row["median_ms"]), percent(row["share_of_roofline"])]
        lines.append([*cells, ", ".join(shares), measured(row)])
    return table(("case", "dtype", "threads", "time", "of the roofline", "where it goes", "run"), lines)


QUANTITIES = {
    "training_peak": "peak memory of a training step, 2x3x128x128 or 8x4x32x32",
    "inference_peak": "peak memory of a process that restores an image, whole",
    "layer_peak": "peak memory of a training step of an encoder and a decoder layer",
    "first_result": "time from the start of a process to its first image",
    "time_per_pixel": "time a pixel",
    "relative_peak": "memory that a call takes",
    "sampler_share": "what a sampler takes beyond its model",
}


def footprint(rows):
    """Peak memory, time a pixel and first results: one line a measurement."""
    lines = []
    for row in newest(rows, "quantity", "model", "dtype", "arguments").values():
        size = row["arguments"].split()
        of = f"{size[0]} x {size[-1]} pixels" if size[0].isdigit() else row["arguments"]
        value = {
            "GiB": lambda gib: memory(gib),
            "s": lambda seconds: time(1e3 * float(seconds)),
            "ns": lambda ns: time(1e-6 * float(ns)),
            "%": lambda percent: f"{float(percent):.1f} %",
        }[row["unit"]](row["value"])
        lines.append([QUANTITIES[row["quantity"]], row["model"], row["dtype"], of, value, measured(row)])
    return table(("what", "model", "dtype", "of", "value", "run"), lines)


def quality(rows):
    """Mean PSNR and SSIM of the shipped IPT-V2 models before and after, one line per data set and noise level."""
    lines = []
    for row in newest(rows, "model", "dataset", "sigma").values():
        before, after, ssim = (float(row[name]) for name in ("psnr_input", "psnr_output", "ssim_output"))
        cells = [row["model"], row["dataset"], row["sigma"] or "-", row["images"], row["protocol"]]
        lines.append([*cells, f"{before:.2f}", f"**{after:.2f}**", f"{ssim:.3f}", measured(row)])
    names = ("model", "data set", "σ", "images", "protocol", "input, dB", "restored, dB", "SSIM", "run")
    return table(names, lines)


def ipt_restoration(path=results.FOLDER / "ipt_tiny.csv"):
    """PSNR of the shipped IPT and of its fine-tuned task before and after."""
    lines = []
    for row in newest(results.read(path), "model", "dataset", "sigma").values():
        before, after = (f"{float(row[name]):.2f}" for name in ("psnr_input", "psnr_output"))
        cells = [row["model"], row["dataset"], row["sigma"] or "-", row["images"], row["protocol"]]
        lines.append([*cells, before, f"**{after}**"])
    return table(("model and task", "data set", "σ", "images", "protocol", "input, dB", "restored, dB"), lines)


GPU_CASE = ("gpu", "model", "shape", "dtype", "direction")


def gpu_models(rows):
    """Milliseconds of whole models on a GPU, one column for each contender; peak memory of ipt_fast and of eager."""
    names = ("mixed", "mixed, no graph", "tuned", "triton", "compiled", "sdpa", "eager")
    rows = newest(rows, *GPU_CASE, "contender", "note")
    lines = []
    for case in dict.fromkeys(key[:5] for key in rows):
        found = {
            f"{name}, {note}" if note else name: row for (*of, name, note), row in rows.items() if tuple(of) == case
        }
        times = [time(found[name]["median_ms"]) if name in found else "-" for name in names]
        peaks = [
            next((memory(r["peak_gib"]) for n, r in found.items() if n.startswith(name) and r["peak_gib"]), "-")
            for name in ("mixed", "eager")
        ]
        _, model, shape, dtype, direction = case
        run = measured(max(found.values(), key=lambda row: row["date"]))
        lines.append([f"{model} {shape}", dtype, direction, *times, " / ".join(peaks), run])
    return table(("model", "dtype", "direction", *names, "memory, mixed / eager", "run"), lines)


def gpu_operators(rows):
    """Microseconds of the largest calls of every operator on a GPU, cold second-level cache."""
    names = ("cuda", "triton", "eager", "sdpa")
    rows = newest((row for row in rows if row["kind"] == "operator"), "name", "shape", "key", "contender")
    lines = []
    for case in dict.fromkeys(key[:3] for key in rows):
        found = {name: rows[*case, name] for name in names if (*case, name) in rows}
        times = [f"{float(found[name]['median_us']):.0f}" if name in found else "-" for name in names]
        run = measured(max(found.values(), key=lambda row: row["date"]))
        lines.append([case[0], case[1], case[2].partition("-")[0], *times, run])
    return table(("operator", "shape", "dtype", *(f"{name}, µs" for name in names), "run"), lines)


def gpu_launches(rows, least=20):
    """Of every kernel the launches of at least so many µs: measured, counted, and what binds."""
    rows = newest((r for r in rows if r["kind"] == "launch" and r["bound_us"]), "name", "shape", "key")
    lines = []
    for row in rows.values():
        if float(row["median_us"]) >= least:
            times = [f"{float(row[name]):.0f}" for name in ("median_us", "bound_us")]
            name = row["name"].removesuffix("_kernel")
            lines.append([name, row["shape"], *times, row["binds"], row["share_of_bound"], measured(row)])
    return table(("kernel", "within", "measured, µs", "counted, µs", "binds", "share", "run"), lines)
