"""``python -m benchmarks.quality``: what the IPT-V2 models that ship gain on public test images, as rows of a CSV.

The images are those of the folder that IPT_FAST_DATA names; a run whose images are absent is left out by name.
"""

import argparse
import os
import pathlib
import re

from benchmarks import results
from ipt_fast.evaluation.runner import FIGURES, evaluate
from ipt_fast.inference import Restorer
from ipt_fast.models import open_model

PATH = results.FOLDER / "quality.csv"
# (model, data set, noise level or None where it has inputs and targets, protocol)
RUNS = [
    *(("ipt_v2_tiny", f"denoise/{name}", sigma, "rgb") for name in ("CBSD68", "Kodak24") for sigma in (15, 25, 50)),
    *(("ipt_v2_tiny", f"denoise/{name}", sigma, "rgb") for name in ("Set12", "BSD68") for sigma in (15, 25, 50)),
    ("ipt_v2_tiny", "denoise_real/CC15", None, "rgb"),
    ("ipt_v2_tiny_camera", "denoise_real/CC15", None, "rgb"),
    ("ipt_v2_tiny_camera", "denoise_real/PolyU", None, "rgb"),
    *(("ipt_v2_tiny_camera", f"denoise/{name}", 25, "rgb") for name in ("CBSD68", "Set12")),
    ("ipt_v2_tiny_derain", "derain/Rain100L", None, "matlab-y"),
    ("ipt_v2_tiny_deblur", "deblur/GoPro", None, "rgb"),
]


def measured(model, folder, sigma, protocol, environment):
    """The row of one run: means over the images of a data set, in float32 as a whole."""
    restorer = Restorer(open_model(model), dtype="float32", tile=None)
    pairs = {} if sigma else {"target": folder / "target"}
    evaluation = evaluate(restorer, folder if sigma else folder / "input", protocol, sigma=sigma, **pairs)
    if evaluation.failures:
        raise SystemExit(f"{folder}: {evaluation.failures}")
    return {
        **{name: environment[name] for name in ("date", "commit", "cpu", "torch")},
        "model": model,
        "dataset": folder.name,
        "sigma": "" if sigma is None else f"{sigma:g}",
        "protocol": protocol,
        "images": len(evaluation.scores),
        **{figure: f"{evaluation.mean(figure):.4f}" for figure in FIGURES},
    }


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=PATH, help="the CSV whose rows are replaced")
    parser.add_argument("--select", default="", metavar="REGEX", help="only runs whose model and data set match")
    args = parser.parse_args()
    if not (data := os.environ.get("IPT_FAST_DATA")):
        parser.error("IPT_FAST_DATA must name the folder of the public test images; it is not set")
    key = ("model", "dataset", "sigma", "protocol")
    rows = {tuple(row[name] for name in key): row for row in (results.read(args.out) if args.out.exists() else [])}
    environment = results.environment()  # before the file of rows changes
    for model, name, sigma, protocol in RUNS:
        if not re.search(args.select, f"{model} {name}"):
            continue
        folder = pathlib.Path(data, name)
        if not folder.is_dir():
            print(f"left out: {folder} is not there")
            continue
        row = measured(model, folder, sigma, protocol, environment)
        rows[tuple(row[name] for name in key)] = row
        print(f"{model:19} {name:19} {row['sigma']:>2} {row['psnr_input']} -> {row['psnr_output']} dB", flush=True)
        results.write(args.out, list(rows.values()))


if __name__ == "__main__":
    main()
