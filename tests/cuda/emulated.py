"""``python -m tests.cuda.emulated`` builds the CUDA kernels for an emulated GPU and prints the library's path.

With IPT_FAST_EMULATED_CUDA=<path> in the environment the backend "cuda" takes CPU tensors (csrc/cuda/emulator.cuh).
"""

import concurrent.futures
import hashlib
import os
import pathlib
import shutil
import subprocess
import sysconfig

import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc/cuda"
HEADERS = ROOT / "csrc"
FLAGS = (
    "-std=c++20 -O2 -fPIC -Wall -Wextra -Werror -Wno-unknown-pragmas -ffp-contract=off -fvisibility=hidden "
    "-U_FORTIFY_SOURCE -DIPT_FAST_EMULATED -DTORCH_TARGET_VERSION=0x020a000000000000"
)


def compiler():
    return next((c for c in (os.environ.get("CXX"), "c++", "g++") if c and shutil.which(c)), None)


def _run(command):
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{result.stdout}{result.stderr}")


def build():
    """The path of the library, built if its sources changed."""
    torch_dir = pathlib.Path(torch.__file__).parent
    includes = ["-isystem", torch_dir / "include", "-isystem", sysconfig.get_path("include"), "-I", HEADERS]
    command = [compiler(), *FLAGS.split(), *includes]
    digest = hashlib.sha256(repr((command, torch.__version__)).encode())
    for path in sorted([*SOURCES.iterdir(), *(HEADERS / "common").iterdir()]):
        digest.update(path.read_bytes())
    folder = ROOT / "build" / f"emulated-{digest.hexdigest()[:12]}"
    library = folder / "ipt_fast_cuda.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    sources = sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.cu")])
    objects = [folder / f"{source.name}.o" for source in sources]
    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        compiled = [
            pool.submit(_run, [*command, "-x", "c++", "-c", source, "-o", target])
            for source, target in zip(sources, objects, strict=True)
        ]
        for each in compiled:
            each.result()
    unfinished = folder / "unfinished.so"
    libraries = [torch_dir / "lib/libtorch_cpu.so", torch_dir / "lib/libc10.so"]
    _run([compiler(), "-shared", "-o", unfinished, *objects, *libraries])
    unfinished.rename(library)
    return library


if __name__ == "__main__":
    print(build())
