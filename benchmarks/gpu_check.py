"""``make gpu-check``: builds, tests, sanitises and measures on an NVIDIA GPU, offline, in ten minutes.

Everything goes to the folder ``--out``: logs, gpu.csv, gpu.png and summary.txt, which says for every part whether it
passed, failed or could not run.
"""

import argparse
import importlib.util
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
OPERATOR_TESTS = ["tests/ops/test_parity.py", "tests/ops/test_not_finite.py", "tests/modules/test_transformer.py"]


def this_architecture():
    import torch

    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}a" if major >= 9 else f"{major}.{minor}"


class Check:
    """Runs the parts one after the other and keeps what became of them."""

    def __init__(self, out, seconds, kept):
        self.out, self.end, self.kept, self.results = out, time.monotonic() + seconds, kept, []

    def run(self, name, command, limit, **environment):
        """A part: its output goes to <name>.log and its end to the screen."""
        limit = min(limit, self.end - time.monotonic())
        if limit < 10:
            self.note(name, "left out for want of time")
            return False
        began = time.monotonic()
        log = self.out / f"{name}.log"
        with open(log, "w") as file:
            process = subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, **environment}, stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                code = "timeout"
                os.killpg(process.pid, signal.SIGKILL)  # whatever it started must not disturb the next part
                process.wait()
        said = log.read_text(errors="replace").strip().splitlines()
        print("\n".join(said[-15:]), flush=True)
        last = said[-1] if said else ""
        self.note(name, f"{'passed' if code == 0 else f'FAILED ({code})'} in {time.monotonic() - began:.0f} s: {last}")
        return code == 0

    def note(self, name, result):
        self.results.append((name, result))
        print(f"== {name}: {result}", flush=True)
        (self.out / "summary.txt").write_text("".join(f"{part}: {said}\n" for part, said in self.results))

    def share(self, part):
        """Seconds: this part of what is left before the time that is kept for measuring."""
        return part * (self.end - self.kept - time.monotonic())

    def build(self):
        """Installs the package with its CUDA kernels, for this GPU only, or without any where there is no nvcc."""
        install = ["install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--editable", "."]
        nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
        kind = (
            {"IPT_FAST_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": this_architecture()} if nvcc else {"IPT_FAST_PURE": "1"}
        )
        return self.run("build", [sys.executable, "-m", "pip", *install], 300, **kind)

    def tests(self):
        pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        if importlib.util.find_spec("xdist"):  # most of the time goes into compiling kernels
            pytest += ["-n", str(min(8, len(os.sched_getaffinity(0))))]
        cublas = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # else its products refuse to be deterministic
        self.run("tests_models", [*pytest, "-m", "gpu", "tests/gpu"], self.share(0.5), **cublas)
        small = {"IPT_FAST_TEST_DEVICE": "cuda", "IPT_FAST_TEST_SIZES": "2"}
        self.run("tests_operators", [*pytest, *OPERATOR_TESTS], self.share(0.6), **cublas, **small)

    def sanitize(self):
        sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
        if sanitizer is None:
            self.note("sanitize", "could not run: there is no compute-sanitizer")
            return
        for i, tool in enumerate(TOOLS):
            command = [sanitizer, "--tool", tool, "--error-exitcode", "99", sys.executable, "-m", "tests.gpu.sanitized"]
            self.run(f"sanitize_{tool}", command, self.share(1 / (len(TOOLS) - i)), PYTORCH_NO_CUDA_MEMORY_CACHING="1")

    def bench(self):
        left = self.end - time.monotonic() - 20
        command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(self.out), "--seconds", str(0.7 * left)]
        self.run("bench", command, left)
        if (self.out / "gpu.csv").exists():
            if importlib.util.find_spec("matplotlib") is None:
                self.note("plot", "could not run: there is no matplotlib")
                return
            plot = [sys.executable, "-m", "benchmarks.plot", str(self.out / "gpu.csv"), str(self.out / "gpu.png")]
            self.run("plot", plot, 60)


def main():
    parser = argparse.ArgumentParser(prog="make gpu-check", description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--part", choices=("all", "tests", "sanitize", "bench"), default="all")
    parser.add_argument("--seconds", type=float, default=580, help="for everything")
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    check = Check(out, args.seconds, kept=0.45 * args.seconds if args.part == "all" else 0)
    if check.build():
        for part in ("tests", "sanitize", "bench"):
            if args.part in ("all", part):
                getattr(check, part)()
    return int(any("FAILED" in result for _, result in check.results))


if __name__ == "__main__":
    sys.exit(main())
