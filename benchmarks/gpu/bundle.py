"""``make gpu-bundle``: one folder with all that `benchmarks.gpu_check` needs on a machine that can download nothing.

The package with its Triton kernels in place, the CUDA library built for Hopper, the tests and the benchmarks. It runs
there with the Python, torch and triton that are there: ``cd FOLDER && python3 -m benchmarks.gpu_check --out DIR``.
"""

import argparse
import os
import pathlib
import shutil
import subprocess
import sys

from benchmarks.gpu import stage

ROOT = stage.ROOT
FOLDER = ROOT / "build" / "gpu-bundle"
PARTS = (
    "benchmarks",
    "tests",
    "csrc",
    "setup.py",
    "CMakeLists.txt",
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
)
ARCHITECTURES = "9.0a"  # of H100 and H200


def make(folder, with_cuda):
    """Fills ``folder`` anew, after what is there is gone."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "kernels", "results", "assets")
    shutil.copytree(ROOT / "ipt_fast", folder / "ipt_fast", ignore=ignored)
    shutil.copytree(ROOT / "kernels", folder / "ipt_fast" / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    for part in PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, folder / part, **({"ignore": ignored} if copy is shutil.copytree else {}))
    (folder / "COMMIT").write_text(stage.commit() + "\n")
    if with_cuda:
        build_library(folder)


def build_library(folder):
    """Builds ipt_fast/_C_cuda into ``folder``."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(folder)]
    wanted = {"IPT_FAST_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": ARCHITECTURES}
    subprocess.run(command, cwd=ROOT, env={**os.environ, **wanted}, check=True)


def build_error(folder):
    """None if the library is built into ``folder``, else why not, in one line."""
    if nvcc() is None:
        return "there is no nvcc to build the CUDA library with"
    try:
        build_library(folder)
    except subprocess.CalledProcessError as error:
        return f"the CUDA library cannot be built: the build ended with {error.returncode}"
    return None


def nvcc():
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=pathlib.Path, nargs="?", default=FOLDER)
    args = parser.parse_args()
    if nvcc() is None:
        parser.error("there is no nvcc to build the CUDA library with")
    make(args.folder, with_cuda=True)
    size = sum(path.stat().st_size for path in args.folder.rglob("*") if path.is_file())
    print(f"{args.folder}: {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
