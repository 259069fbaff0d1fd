"""``python -m benchmarks.plot CSV PNG``: times as fast as the best rival, or the curves of a training's log."""

import sys

from benchmarks import results


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def draw(csv_path, png_path):
    """Plot the newest measurement of each case in ``csv_path`` to ``png_path`` as bars."""
    plt, newest = _pyplot(), {}
    for row in results.read(csv_path):
        if row["contender"] == "ipt_fast" and row["times_faster"]:
            process = row.get("allocator") or row["gpu"]
            newest[row["case"], row["dtype"], row["direction"], process] = float(row["times_faster"])
    if not newest:
        raise SystemExit(f"{csv_path} has no row of ipt_fast with a rival")
    cases = list(dict.fromkeys(key[0] for key in newest))
    series = list(dict.fromkeys(key[1:] for key in newest))
    height = 0.8 / len(series)
    figure, axes = plt.subplots(figsize=(9, 1 + 0.2 * len(cases) * len(series)))
    for i, kind in enumerate(series):
        present = [(n, newest[case, *kind]) for n, case in enumerate(cases) if (case, *kind) in newest]
        positions, values = zip(*present, strict=True)
        axes.barh([p + (i - (len(series) - 1) / 2) * height for p in positions], values, height, label=", ".join(kind))
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(cases)), cases)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set_xlabel("times faster than the best plain PyTorch")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(png_path, dpi=110)


def draw_training(csv_path, png_path, mean_of=10):
    """Plot the loss, each the mean of so many rows of the log, and the PSNR of the validation images."""
    rows = results.read(csv_path)
    chunks = [rows[i : i + mean_of] for i in range(0, len(rows), mean_of)]
    losses = [(int(chunk[-1]["iteration"]), sum(float(row["loss"]) for row in chunk) / len(chunk)) for chunk in chunks]
    measured = [(int(row["iteration"]), float(row["psnr"])) for row in rows if row["psnr"]]
    figure, panels = _pyplot().subplots(1, 2, figsize=(9, 3))
    for axes, curve, label in zip(panels, (losses, measured), ("loss", "PSNR of the average model, dB"), strict=True):
        axes.plot(*zip(*curve, strict=True), marker=".")
        axes.set_xlabel("iteration")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(png_path, dpi=110)


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        is_training = file.readline().startswith("iteration,")
    (draw_training if is_training else draw)(*sys.argv[1:])
