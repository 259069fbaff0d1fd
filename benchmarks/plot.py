"""How much faster than the best rival: the newest row of every case as bars. ``python -m benchmarks.plot CSV PNG``"""

import sys

from benchmarks import results


def draw(csv_path, png_path):
    """Plot the newest measurement of each case in ``csv_path`` to ``png_path``."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    newest = {}
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


if __name__ == "__main__":
    draw(*sys.argv[1:])
