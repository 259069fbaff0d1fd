"""``python -m benchmarks.table``: the README's tables, from the rows in benchmarks/results."""

from benchmarks import results


def newest(rows, *key):
    """{values of the columns ``key``: row}, later rows replacing earlier ones."""
    return {tuple(row[column] for column in key): row for row in rows}


def denoising(path=results.FOLDER / "denoise.csv"):
    """Mean PSNR of the shipped model before and after, one line per data set and noise level."""
    lines = ["| data set | σ | images | noisy, dB | restored, dB | SSIM |", "|---|---|---|---|---|---|"]
    for row in newest(results.read(path), "dataset", "sigma").values():
        before, after, ssim = (float(row[name]) for name in ("psnr_input", "psnr_output", "ssim_output"))
        line = f"{row['dataset']} | {row['sigma']} | {row['images']} | {before:.2f} | **{after:.2f}** | {ssim:.3f}"
        lines.append(f"| {line} |")
    return "\n".join(lines)


def speed(path=results.FOLDER / "cpu.csv"):
    """Times faster than the best plain PyTorch, forward / training, in the default and in the tuned process.

    A commit need not have measured everything: every figure is of the last commit that measured it.
    """
    ours = [row for row in results.read(path) if row["contender"] == "ipt_fast"]
    rows = newest(ours, "case", "dtype", "allocator", "direction")
    lines = ["| case | dtype | default process | tuned allocator |", "|---|---|---|---|"]
    for case, dtype in dict.fromkeys(key[:2] for key in rows):
        cells = []
        for allocator in ("default", "tuned"):
            pair = [rows.get((case, dtype, allocator, direction)) for direction in ("forward", "training")]
            cells.append(" / ".join(row["times_faster"] if row else "-" for row in pair))
        lines.append(f"| {case} | {dtype} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def footprint(path=results.FOLDER / "cpu_footprint.csv"):
    """Peak memory, time per pixel and first results: one line per measurement."""
    lines = ["| quantity | model | dtype | of | value |", "|---|---|---|---|---|"]
    for row in newest(results.read(path), "quantity", "model", "dtype", "arguments").values():
        cells = (row["quantity"].replace("_", " "), row["model"], row["dtype"], row["arguments"])
        lines.append(f"| {' | '.join(cells)} | {row['value']} {row['unit']} |")
    return "\n".join(lines)


def ipt(path=results.FOLDER / "ipt_cpu.csv"):
    """IPT beside the released code: milliseconds, with glibc's allocator as it is and tuned."""
    lines = [
        "| what | dtype | direction | allocator | best eager | ipt_fast | times faster |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = newest(results.read(path), "case", "dtype", "direction", "allocator", "contender")
    for (*key, contender), ours in rows.items():
        if contender == "ipt_fast":
            rivals = [row for (*of, name), row in rows.items() if of == key and name != "ipt_fast"]
            best = min(rivals, key=lambda row: float(row["median_ms"]))
            times = [f"{float(row['median_ms']):,.0f} ms" for row in (best, ours)]
            lines.append(f"| {' | '.join([*key, *times])} | {float(ours['times_faster']):.2f} |")
    return "\n".join(lines)


def ipt_restoration(path=results.FOLDER / "ipt_tiny.csv"):
    """PSNR of the shipped IPT and of its fine-tuned task before and after."""
    names = ("model and task", "data set", "σ", "images", "protocol", "input, dB", "restored, dB")
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    for row in newest(results.read(path), "model", "dataset", "sigma").values():
        before, after = (f"{float(row[name]):.2f}" for name in ("psnr_input", "psnr_output"))
        cells = [row["model"], row["dataset"], row["sigma"] or "-", row["images"], row["protocol"], before]
        lines.append(f"| {' | '.join(cells)} | **{after}** |")
    return "\n".join(lines)


def gpu_models(path=results.FOLDER / "gpu_models.csv"):
    """Milliseconds of whole models on GPUs, one column for each contender; peak memory of ipt_fast and of eager."""
    names = ("mixed", "mixed, no graph", "tuned", "triton", "compiled", "sdpa", "eager")
    lines = [f"| GPU | model | dtype | direction | {' | '.join(names)} | GiB, mixed / eager |"]
    lines.append("|" + "---|" * (len(names) + 5))
    rows = newest(results.read(path), "gpu", "model", "shape", "dtype", "direction", "contender", "note")
    for case in dict.fromkeys(key[:5] for key in rows):
        found = {
            f"{name}, {note}" if note else name: row for (*of, name, note), row in rows.items() if tuple(of) == case
        }
        times = [f"{float(found[name]['median_ms']):.2f}" if name in found else "-" for name in names]
        peaks = [
            next((r["peak_gib"] for n, r in found.items() if n.startswith(name) and r["peak_gib"]), "-")
            for name in ("mixed", "eager")
        ]
        gpu, model, shape, dtype, direction = case
        cells = [gpu.removeprefix("NVIDIA "), f"{model} {shape}", dtype, direction, *times, " / ".join(peaks)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def gpu_operators(path=results.FOLDER / "gpu_kernels.csv"):
    """Microseconds of the largest calls of every operator on GPUs, cold second-level cache."""
    names = ("cuda", "triton", "eager", "sdpa")
    rows = [row for row in results.read(path) if row["kind"] == "operator"]
    rows = newest(rows, "gpu", "name", "shape", "key", "contender")
    lines = [f"| GPU | operator | shape | {' | '.join(names)} |", "|" + "---|" * (len(names) + 3)]
    for case in dict.fromkeys(key[:4] for key in rows):
        gpu, name, shape, _ = case
        times = [f"{float(rows[*case, n]['median_us']):.0f}" if (*case, n) in rows else "-" for n in names]
        lines.append(f"| {gpu.removeprefix('NVIDIA ')} | {name} | {shape} | {' | '.join(times)} |")
    return "\n".join(lines)


def gpu_launches(path=results.FOLDER / "gpu_kernels.csv", least=20):
    """Of every kernel the launches of at least so many µs: measured, counted, and what binds."""
    names = ("GPU", "kernel", "within", "measured, µs", "counted, µs", "binds", "share")
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    rows = [row for row in results.read(path) if row["kind"] == "launch" and row["bound_us"]]
    for row in newest(rows, "gpu", "name", "shape", "key").values():
        if float(row["median_us"]) >= least:
            cells = [row["gpu"].removeprefix("NVIDIA "), row["name"].removesuffix("_kernel"), row["shape"]]
            cells += [f"{float(row[name]):.0f}" for name in ("median_us", "bound_us")]
            lines.append(f"| {' | '.join([*cells, row['binds'], row['share_of_bound']])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    tables = (denoising, speed, footprint, ipt, ipt_restoration, gpu_models, gpu_operators, gpu_launches)
    print("\n\n".join(table() for table in tables))
