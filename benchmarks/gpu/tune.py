"""Chooses the configurations of the Triton kernels and, for every operator and width, the faster of Triton and CUDA.

An operator's call is timed as a graph with each configuration of each of its kernels, one kernel after the other, in
the order in which they ask. What was found is kept after every call: in tuned.json, and in kernels/configs/<GPU>.json,
where the kernels of the next process find it. A configuration that takes the GPU down ends the process; another one
goes on after it.
"""

import json
import os
import subprocess
import sys

import torch

from benchmarks.gpu import calls, device, stage
from ipt_fast._files import atomic_write
from ipt_fast.kernels import _launch

LEAST_GAIN = 0.02  # a configuration replaces the one before it only if it is so much faster


def kept(args, gpu):
    """The configurations that this stage has found for the card of this name, {(kernel, key): configuration}."""
    return Tuned([]).read(folder_of(args) / _launch.path_of(gpu).name)


def folder_of(args):
    return args.work if args.rehearse else _launch.CONFIGS


class Tuned:
    """What has been measured, as `_launch.measured_on` has it."""

    def __init__(self, paths, capability=None):
        self.paths = paths
        self.values = {"capability": capability, "kernels": {}, "operators": {}}

    def read(self, path):
        """The configurations that a file has, if it is there, {(kernel, key): configuration}."""
        if path.exists():
            self.values = json.loads(path.read_text())
        return {(name, key): value for name, found in self.values["kernels"].items() for key, value in found.items()}

    def keep(self, part, name, key, value):
        self.values[part].setdefault(name, {})[key] = value

    def write(self):
        for path in self.paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as temporary:
                temporary.write_text(json.dumps(self.values, indent=1, sort_keys=True) + "\n")


def tune(gpu, call, arguments, taken, tuned, broken):
    """Tries what ``call`` asks and ``taken``, {(kernel, key): configuration}, does not settle yet.

    ``broken``: the file of the configurations that failed. One that gives another result than the default has failed.
    """
    known = stage.read_json_lines(broken)
    function = gpu.run(call, "triton", arguments)
    failures = []
    while True:
        with _launch.tuning(taken) as tuning:
            function()
        place = next((p for p in tuning.asked if p not in taken), None)
        if place is None:
            return failures
        candidates = tuning.asked[place]
        best, taken[place], expected = None, candidates[0], None
        for candidate in candidates if len(candidates) > 1 else []:
            line = {"place": list(place), "candidate": candidate}
            if line in known:
                continue
            try:
                seconds, result = measured(gpu, function, taken | {place: candidate})
                expected = result if expected is None else expected
                gpu.check_equal(result, expected)
            except Exception as error:
                stage.write_json(broken, line)
                if stage.is_lost(error):
                    print(f"FAILED: the GPU is lost: {call.label} {place} {candidate}: {str(error)[:100]}", flush=True)
                    os._exit(stage.LOST)  # the ordinary end would wait for the GPU
                failures.append(f"{place} {candidate}: {type(error).__name__}: {str(error)[:200]}")
                continue
            print(f"  {seconds * 1e6:8.1f} µs  {place[0]} {place[1]} {candidate}", flush=True)
            if best is None or seconds < best * (1 - LEAST_GAIN):
                best, taken[place] = seconds, candidate
        tuned.keep("kernels", *place, taken[place])
        tuned.write()


def measured(gpu, function, taken):
    """(seconds, the result)."""
    with _launch.tuning(taken):
        replay = gpu.graph(function)
    return gpu.seconds({"": replay}, rounds=7)[""], gpu.copied(replay())


def main():
    args = stage.arguments(__doc__, worker=dict(action="store_true"))
    if args.worker:
        return work(args)
    command, code = [sys.executable, "-m", __spec__.name, "--worker", *sys.argv[1:]], stage.LOST
    while code == stage.LOST:
        code = subprocess.run(command).returncode
    raise SystemExit(code or (args.work / "broken.jsonl").exists())


def work(args):
    gpu = device.opened(args.rehearse)
    paths = [folder_of(args) / _launch.path_of(gpu.name).name, args.out / "tuned.json", args.work / "tuned.json"]
    tuned = Tuned(paths, gpu.capability)
    resumed = args.work / "tuned.json"  # by the process before this one, if the GPU was lost
    taken, failures, compared = tuned.read(resumed), [], set()
    chosen = calls.matching(args.only)
    for call in sorted(chosen, key=lambda call: call.is_backward)[: 3 if args.rehearse else None]:
        with torch.no_grad(), stage.reported(call.label, failures):
            arguments = gpu.arguments(call)
            print(call.label, flush=True)
            failures += tune(gpu, call, arguments, taken, tuned, args.work / "broken.jsonl")
            if not call.is_backward and (call.name, call.key) not in compared:
                compared.add((call.name, call.key))
                compare(gpu, call, arguments, taken, tuned)
        tuned.write()
        gpu.free()
    for failure in failures:
        print(f"FAILED: {failure}", flush=True)
    raise SystemExit(bool(failures))


def compare(gpu, call, arguments, taken, tuned):
    """Keeps the faster backend, where there are two."""
    if reason := gpu.reason_against(call, "cuda", arguments):
        print(f"  Triton: {reason}", flush=True)
        return
    with _launch.tuning(taken):
        found = gpu.seconds({name: gpu.graph(gpu.run(call, name, arguments)) for name in ("triton", "cuda")})
    fastest = min(found, key=found.get)
    tuned.keep("operators", call.name, call.key, fastest)
    shown = ", ".join(f"{name} {seconds * 1e6:.1f}" for name, seconds in found.items())
    print(f"  {shown} µs: {fastest}", flush=True)


if __name__ == "__main__":
    main()
