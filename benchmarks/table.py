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


if __name__ == "__main__":
    print("\n\n".join(table() for table in (denoising, speed, footprint, ipt, ipt_restoration)))
