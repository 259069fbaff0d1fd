"""Charts: README's bars, and (``python -m benchmarks.plot CSV PNG``) the curves of a training's log."""

import sys

from benchmarks import results


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def draw_headline(rows, png_path):
    """Bars of what README shows: how many times as fast as the best rival.

    Args:
        rows: [(kind of processor, case, dtype, direction, milliseconds of the best rival, its name, of ipt_fast)].
        png_path: where to.
    """
    figure, axes = _pyplot().subplots(figsize=(8, 0.5 * len(rows) + 0.6))
    ratios = [theirs / ours for *_, theirs, _, ours in rows]
    kinds = list(dict.fromkeys(row[0] for row in rows))
    colours = ["#3b6ea5", "#5b9a68", "#c0703a"]
    bars = axes.barh(range(len(rows)), ratios, 0.62, color=[colours[kinds.index(row[0]) % 3] for row in rows])
    axes.bar_label(bars, [f"{ratio:.1f} x" for ratio in ratios], padding=4, fontsize=11, fontweight="bold")
    axes.set_yticks(range(len(rows)), [f"{case.split()[0]}, {direction}" for _, case, _, direction, *_ in rows])
    for bar, (kind, *_) in zip(bars, rows, strict=True):
        name = kind.partition(" @")[0].partition(",")[0] + (", AMX" if "AMX" in kind else "")
        axes.text(0.06, bar.get_y() + bar.get_height() / 2, name, color="white", va="center", fontsize=8)
    axes.axvline(1, color="black", linewidth=1, zorder=0)
    axes.set_title("times faster than the best rival that was measured (1: as fast)", fontsize=10, loc="left")
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * max(ratios))
    axes.tick_params(length=0, labelsize=10)
    axes.set_xticks([])
    for side in axes.spines.values():
        side.set_visible(False)
    figure.tight_layout()
    figure.savefig(png_path, dpi=110, metadata={"Software": None})


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
    draw_training(*sys.argv[1:])
