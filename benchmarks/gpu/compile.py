"""Compiles the Triton kernels of the models into Triton's cache, in several processes: those that the models take, in
default and in tuned configurations, or, with ``--variants``, all others of the calls that ``--only`` matches.

The launches are recorded, then compiled through the JIT itself, so that its cache holds what it will look for. No GPU
is touched: a stand-in for Triton's driver tells which one it is for.
"""

import functools
import json
import multiprocessing
import time
import traceback

import triton
from triton.backends.compiler import GPUTarget

from benchmarks.ahead_of_time import key_of
from benchmarks.gpu import calls, stage, tune
from ipt_fast.kernels import _launch


class Driver:
    """What the JIT asks before it compiles, answered for a card that need not be there."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def variants(call):
    """The launches of a call in every configuration of every kernel, the default ones first."""
    waiting, known = [{}], set()
    while waiting:
        taken = waiting.pop(0)
        with _launch.tuning(taken) as tuning:
            yield from call.launches()
        for place, candidates in tuning.asked.items():
            if place not in known:
                known.add(place)
                waiting += [taken | {place: candidate} for candidate in candidates[1:]]


def wanted(only, narrow, others, tuned):
    """One launch of every kernel: forward before backward, larger calls before smaller ones."""
    chosen = sorted(calls.of_models(training=not narrow), key=lambda call: call.is_backward)
    if narrow:
        chosen = [call for call in chosen if "ipt_v2_small" in call.counts]

    def distinct(launches, chosen=chosen):
        return {key_of(launch): launch for call in chosen for launch in launches(call) if launch.kernel is not None}

    with _launch.tuning(tuned):
        found = distinct(calls.Call.launches)
    found = distinct(calls.Call.launches) | found
    if others:
        matching = distinct(variants, [call for call in chosen if only.search(call.label)])
        found = {key: launch for key, launch in matching.items() if key not in found}
    return list(found.values())


_launches = []  # in the parent; the children of its fork have them, too


def compile_one(with_launcher, index):
    """{"kernel", "seconds", "error"} of one launch."""
    launch, began = _launches[index], time.monotonic()
    line = {"kernel": launch.kernel.__name__, "meta": launch.meta, "error": None}
    try:
        compiled = launch.kernel.warmup(*launch.arguments, grid=launch.grid, **launch.meta)
        if with_launcher:  # compiled C, in the cache, too
            from triton.backends.nvidia.driver import CudaLauncher

            CudaLauncher(compiled.src, compiled.metadata)
    except Exception:
        line["error"] = traceback.format_exc(limit=-4)
    return line | {"seconds": round(time.monotonic() - began, 2)}


def main():
    args = stage.arguments(__doc__, processes=dict(type=int, default=2), variants=dict(action="store_true"))
    began = time.monotonic()
    facts = json.loads((args.work / "facts.json").read_text())
    kept = tune.kept(args, facts["gpu"])
    major, minor = facts["capability"]
    triton.runtime.driver.set_active(Driver(10 * major + minor))
    _launches.extend(
        wanted(args.only, args.rehearse, args.variants, kept)[: 8 if args.rehearse and args.variants else None]
    )
    print(f"{len(_launches)} kernels to compile", flush=True)
    failed = []
    with multiprocessing.get_context("fork").Pool(args.processes) as pool:
        work = functools.partial(compile_one, not args.rehearse)
        for line in pool.imap_unordered(work, range(len(_launches))):
            stage.write_json(args.work / "compiled.jsonl", line)
            if line["error"]:
                failed.append(line)
                print(f"FAILED: {line['kernel']} {json.dumps(line['meta'])}\n{line['error']}", flush=True)
    print(
        f"compiled in {time.monotonic() - began:.0f} s by {args.processes} processes; {len(failed)} failed", flush=True
    )
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
