"""``make gpu-check``: what an NVIDIA GPU makes of the kernels, in minutes: are they right, and how fast are they?

Stages are programs of their own (benchmarks/gpu) with deadlines. What does not time anything runs side by side; what
does runs alone. A stage that fails or ends at its deadline stops no other. Results go to ``--out``, flushed line by
line: parity.jsonl, tuned.json, kernels.csv, models.csv, sanitize.log, log and summary.txt.

``--rehearse`` runs all of it where there is no GPU: the CUDA kernels emulated, Triton's interpreted, times invented.
"""

import argparse
import contextlib
import csv
import dataclasses
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
FIRST, SECOND = 450, 180  # seconds
RESULTS = ("parity.jsonl", "tuned.json", "kernels.csv", "models.csv", "sanitize.log", "log", "summary.txt")


@dataclasses.dataclass
class Stage:
    """A program, ``python -m benchmarks.gpu.<module> <options>``, or another module with its options alone.

    ``after``: stages that must have ended before; ``alone``: nothing else may run beside it; ``prepares``: it begins
    beside the others, is stopped while one of them runs alone, and waits for its own turn before it times anything;
    ``nice``: it yields to the others; ``tool``: a program that runs it, whose output is a result of its own.
    """

    name: str
    module: str
    seconds: float
    options: tuple = ()
    after: tuple = ()
    alone: bool = False
    prepares: bool = False
    nice: bool = False
    tool: tuple = ()
    environment: dict = dataclasses.field(default_factory=dict)


def sanitizer(name):
    found = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    return (found or "compute-sanitizer", "--tool", name, "--error-exitcode", "99", "--kernel-name", "kns=ipt_fast")


def first_run(cores):
    """The stages, the most valuable ones first."""
    processes = ("--processes", str(max(1, cores - 2)))
    return [
        Stage("facts", "facts", 100),
        Stage("compile", "compile", 60, processes, after=("facts",)),
        Stage("cuda parity", "parity", 75, ("--backend", "cuda", "--processes", "2"), after=("facts",)),
        Stage("memcheck", "sanitized", 80, after=("cuda parity",), tool=sanitizer("memcheck")),
        Stage("racecheck", "sanitized", 80, after=("cuda parity",), tool=sanitizer("racecheck")),
        Stage("triton parity", "parity", 90, ("--backend", "triton", "--processes", "8"), after=("compile",)),
        Stage("variants", "compile", 120, ("--variants", *processes), after=("compile",), nice=True),
        Stage("tune", "tune", 75, alone=True),
        Stage("models", "models", 90, ("--part", "models"), alone=True),
        Stage("kernels", "kernels", 80, alone=True),
        *(
            Stage(f"compiled {name}", "models", 60, ("--part", "compiled", "--model", name), ("facts",), True, True)
            for name in ("ipt_v2_small", "ipt_v2_base")
        ),
        Stage("bounds", "bounds", 60, after=("kernels",)),
        Stage("large maps, cuda", "parity", 40, ("--backend", "cuda", "--large"), after=("kernels",)),
        Stage("large maps, triton", "parity", 40, ("--backend", "triton", "--large"), after=("large maps, cuda",)),
        Stage("tests", "pytest", 60, ("-q", "-m", "gpu", "tests/gpu/test_models.py"), alone=True),
        Stage("rest", "models", 60, ("--part", "rest"), alone=True),
    ]  # fmt: skip


def second_run(cores):
    """Of what matches --only: parity, timing and racecheck; then both models beside their rivals."""
    kept = {"facts", "compile", "variants", "cuda parity", "racecheck", "triton parity", "tune", "models", "kernels"}
    stages = [stage for stage in first_run(cores) if stage.name in kept]
    return [*stages, Stage("bounds", "bounds", 60, after=("kernels",))]


def rehearsed(stages):
    """The same stages on a machine without a GPU."""
    stages = [stage for stage in stages if stage.module != "pytest"]
    for stage in stages:
        stage.options += ("--rehearse",)
        stage.seconds *= 4
        stage.tool = ()
        if "processes" in " ".join(stage.options):
            at = stage.options.index("--processes")
            stage.options = (*stage.options[: at + 1], "2", *stage.options[at + 2 :])
        if "triton" in stage.options:
            stage.environment = {"TRITON_INTERPRET": "1"}
    return [stage for stage in stages if "--large" not in stage.options]


class Run:
    """Runs stages as soon as they may, each until its deadline, and all until the end of the run."""

    def __init__(self, folder, out, work, options, environment, seconds):
        self.folder, self.out, self.work, self.options = folder, out, work, options
        self.environment, self.end = environment, time.monotonic() + seconds
        self.began, self.running, self.ended = time.monotonic(), {}, {}
        self.preparing = {}

    def say(self, line):
        text = f"[{time.monotonic() - self.began:5.0f} s] {line}"
        print(text, flush=True)
        with open(self.out / "summary.txt", "a") as file:
            file.write(text + "\n")

    def all(self, stages):
        waiting = list(stages)
        while waiting or self.running:
            self.collect()
            if time.monotonic() > self.end:
                for stage in waiting:
                    self.ended[stage.name] = "left out for want of time"
                    self.say(f"{stage.name}: {self.ended[stage.name]}")
                waiting = []
            for stage in list(waiting):
                ready = all(name in self.ended for name in stage.after)
                if any(running.alone for running, *_ in self.running.values()):
                    break
                if stage.prepares and ready and stage.name not in self.preparing:
                    self.preparing[stage.name] = self.start(stage)
                if stage.alone and (self.running or stage is not waiting[0]):
                    continue
                if ready:
                    waiting.remove(stage)
                    self.turn(stage)
            time.sleep(0.05)

    def turn(self, stage):
        """It is the stage's turn: others are stopped if it runs alone."""
        process = self.preparing.pop(stage.name) if stage.prepares else self.start(stage)
        if process is None:
            return
        if stage.prepares:
            (self.work / f"turn of {stage.name}").touch()
            send(process, signal.SIGCONT)
        if stage.alone:
            for other in filter(None, self.preparing.values()):
                send(other, signal.SIGSTOP)
        self.running[stage.name] = stage, process, time.monotonic()

    def stop(self):
        """Ends whatever still runs."""
        for process in (*(process for _, process, _ in self.running.values()), *self.preparing.values()):
            if process is not None:
                kill(process)
        for path in self.out.glob(".*"):  # files that a stage was about to replace
            path.unlink()

    def command(self, stage):
        nice = ("nice", "-n", "10") if stage.nice else ()
        module = (stage.module,) if stage.module == "pytest" else (f"benchmarks.gpu.{stage.module}", *self.options)
        if stage.prepares:
            module += ("--turn", str(self.work / f"turn of {stage.name}"))
        return [*nice, *stage.tool, sys.executable, "-m", *module, *stage.options]

    def start(self, stage):
        """The stage's process, or None if it cannot run."""
        command = self.command(stage)
        log = open(self.out / ("sanitize.log" if stage.tool else "log"), "ab")  # noqa: SIM115, the process has it
        log.write(f"\n== {stage.name}: {' '.join(command)}\n".encode())
        log.flush()
        try:
            return subprocess.Popen(
                command, cwd=self.folder, env={**self.environment, **stage.environment}, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            self.ended[stage.name] = f"could not run: {error}"
            self.say(f"{stage.name}: {self.ended[stage.name]}")
        return None

    def collect(self):
        now = time.monotonic()
        for name, (stage, process, began) in list(self.running.items()):
            code = process.poll()
            if code is None and now - began < stage.seconds and now < self.end:
                continue
            result = {None: "ended at its deadline", 0: "passed"}.get(code, f"FAILED ({code})")
            kill(process)  # and whatever it has left running
            del self.running[name]
            for other in filter(None, self.preparing.values() if stage.alone else ()):
                send(other, signal.SIGCONT)
            self.ended[name] = result
            self.say(f"{name}: {result} after {now - began:.0f} s")


def send(process, number):
    """A signal, to all of the process's session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def kill(process):
    send(process, signal.SIGKILL)
    process.wait()


def worst(out, count=10):
    """The launches that are farthest from their bounds, as lines."""
    path = out / "kernels.csv"
    rows = list(csv.DictReader(path.open())) if path.exists() else []
    rows = [row for row in rows if row["share_of_bound"]]
    rows.sort(key=lambda row: float(row["share_of_bound"]))
    shown = ("share_of_bound", "median_us", "bound_us", "binds", "name", "shape")
    return ["  ".join(row[name] for name in shown) for row in rows[:count]]


def prepare(rehearse, work):
    """(the folder with everything in place, the environment of the stages, what went wrong or None)."""
    folder, is_bundle, error = ROOT, (ROOT / "COMMIT").exists(), None
    if not is_bundle or not (rehearse or list((ROOT / "ipt_fast").glob("_C_cuda*.so"))):
        from benchmarks.gpu import bundle  # it imports torch, which takes its time on a fresh machine

        if not is_bundle:
            folder = work / "bundle"
            bundle.make(folder, with_cuda=False)
        if not rehearse:
            error = bundle.build_error(folder)
    environment = {
        **os.environ,
        "PYTHONPATH": str(folder),
        "PYTHONUNBUFFERED": "1",
        "TRITON_CACHE_DIR": str(work / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # else its products refuse to be deterministic
        "IPT_FAST_PURE": "1",  # there may be no kernels for the CPU, and none is wanted
    }
    if rehearse:
        from tests.cuda import emulated

        environment |= {"IPT_FAST_EMULATED_CUDA": str(emulated.build()), "OMP_NUM_THREADS": "1"}
    return folder, environment, error


def main():
    parser = argparse.ArgumentParser(prog="make gpu-check", description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for the results")
    parser.add_argument("--only", default="", help="second run: what matches this regular expression")
    parser.add_argument("--stages", default="", help="only stages whose names match this regular expression")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU")
    parser.add_argument("--seconds", type=float, help=f"for everything; default {FIRST}, with --only {SECOND}")
    args = parser.parse_args()
    out, work = args.out.resolve(), ROOT / "build" / "gpu-check-work"
    shutil.rmtree(work, ignore_errors=True)
    for folder in (out, work):
        folder.mkdir(parents=True, exist_ok=True)
    for name in RESULTS:
        (out / name).unlink(missing_ok=True)
    began = time.monotonic()
    folder, environment, error = prepare(args.rehearse, work)
    seconds = args.seconds or (SECOND if args.only else FIRST) * (4 if args.rehearse else 1)
    options = ("--out", str(out), "--work", str(work), *(("--only", args.only) if args.only else ()))
    cores = len(os.sched_getaffinity(0))
    stages = second_run(cores) if args.only else first_run(cores)
    stages = [stage for stage in stages if re.search(args.stages, stage.name)]
    if not stages:
        parser.error(f"no stage matches {args.stages!r}")
    names = [stage.name for stage in stages]
    for stage in stages:
        stage.after = tuple(name for name in stage.after if name in names)
    if not args.rehearse:
        seconds -= time.monotonic() - began
    run = Run(folder, out, work, options, environment, seconds)
    if error:
        run.ended["build"] = f"FAILED: {error}"
        run.say(f"build: {run.ended['build']}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        run.all(rehearsed(stages) if args.rehearse else stages)
        run.say("farthest from their bounds:\n" + "\n".join(worst(out)))
    finally:
        run.stop()
        if folder != ROOT and not args.rehearse:  # what was tuned belongs to the sources
            for path in (folder / "ipt_fast" / "kernels" / "configs").glob("*.json"):
                shutil.copy(path, ROOT / "kernels" / "configs")
    return int(any(result != "passed" for result in run.ended.values()))


if __name__ == "__main__":
    sys.exit(main())
