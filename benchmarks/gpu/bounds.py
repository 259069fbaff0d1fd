"""Adds to kernels.csv what every launch should take at least, counted from the machine code, in one process a core."""

import csv
import json

import torch

from benchmarks import bound
from benchmarks.gpu import calls, device, kernels, stage, tune
from ipt_fast._files import atomic_write
from ipt_fast.kernels import _launch


def ceilings_of(args, gpu):
    """Of the card: the rates that the stage "facts" measured, the rest by the data sheet."""
    known = next((c for name, c in bound.GPUS.items() if name in gpu), bound.H100)
    facts = json.loads((args.work / "facts.json").read_text())
    rates = {"bytes": facts["copy_bytes_per_s"], "matrix": facts["product_flop_per_s"]}
    return bound.dataclasses.replace(known, **rates)


def identity(call_label, launch):
    return launch.kernel.__name__, call_label, kernels.shown(launch.meta)


def counted(rows, taken, ceilings):
    """{identity: `Bound`} of the launches that have a row."""
    wanted, found = {(row["name"], row["shape"], row["key"]) for row in rows if row["kind"] == "launch"}, {}
    for call in calls.of_models():
        with torch.no_grad(), _launch.tuning(taken):
            for launch in call.launches():
                if launch.kernel is not None and identity(call.label, launch) in wanted:
                    found[identity(call.label, launch)] = launch
    return dict(zip(found, bound.bounds(list(found.values()), ceilings), strict=True))


def main():
    args = stage.arguments(__doc__)
    path = args.out / "kernels.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    gpu = device.opened(args.rehearse)
    found = counted(rows, tune.kept(args, gpu.name), ceilings_of(args, gpu.name))
    for row in rows:
        if each := found.get((row["name"], row["shape"], row["key"])):
            row["bound_us"], row["binds"] = f"{each.seconds * 1e6:.4g}", each.binds
            row["share_of_bound"] = f"{each.seconds * 1e6 / float(row['median_us']):.3f}"
            row["registers"] = each.registers
    with atomic_write(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, kernels.COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"{len(found)} launches have a bound", flush=True)


if __name__ == "__main__":
    main()
