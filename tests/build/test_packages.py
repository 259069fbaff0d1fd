"""What is in wheels and source distributions, and that they can be installed where nothing else is."""

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version

from ipt_fast import _extension
from tests.build.building import (
    ROOT,
    SUFFIX,
    UNSET,
    Environment,
    build_wheel,
    call_backend,
    copy_small_sources,
    copy_sources,
    library_names,
    metadata,
    run_installed,
    succeed,
    wheel_metadata,
    wheel_of,
)
from tests.test_docs import text_of

compiled = pytest.mark.skipif(not _extension.load(), reason=_extension.error() or "")
LIBRARIES = [f"ipt_fast/_C{SUFFIX}", f"ipt_fast/_build_info{SUFFIX}"]


def torch_requirement(fields):
    (text,) = [text for text in fields.get_all("Requires-Dist") if Requirement(text).name == "torch"]
    return Requirement(text).specifier


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small checkout with a compiled wheel."""
    checkout = copy_small_sources(tmp_path_factory.mktemp("packages") / "checkout")
    process, _ = build_wheel(checkout, CMAKE_BUILD_TYPE="None")
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    return checkout


@compiled
def test_compiled_wheel(small, tmp_path):
    """A wheel built from a bare copy carries both modules, and they load."""
    with zipfile.ZipFile(wheel_of(small)) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path)
    assert library_names(names) == LIBRARIES
    assert {f"ipt_fast/evaluation/{name}" for name in ("page.css", "page.js", "published.csv")} <= set(names)
    assert "ipt_fast/py.typed" in names and "ipt_fast/_why_pure.txt" not in names
    script = "from ipt_fast import _extension as e; print(e.__file__, e.error(), e.isa())"
    assert f"None {_extension.isa()}" in run_installed(tmp_path, script)


@compiled
def test_no_path_of_this_machine_is_in_the_modules(small):
    with zipfile.ZipFile(wheel_of(small)) as archive:
        for name in LIBRARIES:
            content = archive.read(name)
            for path in (small, Path(torch.__file__).parent, Path.home(), sys.prefix):
                assert str(path).encode() not in content, (name, path)


@compiled
def test_a_compiled_wheel_asks_for_its_torch(small):
    """Of the same minor version, whatever its patch and its label; others only promise what the code needs."""
    allowed = torch_requirement(wheel_metadata(wheel_of(small)))
    major, minor = Version(torch.__version__).release[:2]
    for version in (torch.__version__, f"{major}.{minor}.0", f"{major}.{minor}.7+cpu", f"{major}.{minor}.0+cu130"):
        assert allowed.contains(version), version
    assert allowed.contains(f"{major}.{minor}.0a0+git12", prereleases=True)
    for version in (f"{major}.{minor - 1}.1", f"{major}.{minor + 1}.0", f"{major}.{minor + 1}.0+cpu"):
        assert not allowed.contains(version), version


@compiled
def test_nothing_of_an_earlier_build_is_packaged(small):
    """Modules that are no longer in the source, compiled ones, and those that an editable install left in place."""
    for deleted in ("ipt_fast/tiling.py", "ipt_fast/cli/plot.py"):
        assert deleted in zipfile.ZipFile(wheel_of(small)).namelist()
        (small / deleted).unlink()
    (small / f"ipt_fast/_C{SUFFIX}").write_bytes(b"old")
    (small / f"ipt_fast/_C_cuda{SUFFIX}").write_bytes(b"old")
    for left_over in ("lib", "bdist.linux-x86_64/wheel"):
        (small / "build" / left_over / "ipt_fast").mkdir(parents=True, exist_ok=True)
        (small / "build" / left_over / "ipt_fast/old.py").touch()
    process, names = build_wheel(small, CMAKE_BUILD_TYPE="None")
    assert process.returncode == 0 and library_names(names) == LIBRARIES
    assert not {"ipt_fast/tiling.py", "ipt_fast/cli/plot.py", "ipt_fast/old.py"} & set(names)
    process, names = build_wheel(small, IPT_FAST_PURE="1")
    assert process.returncode == 0 and library_names(names) == [] and "ipt_fast/_why_pure.txt" in names
    assert not {"ipt_fast/tiling.py", "ipt_fast/cli/plot.py", "ipt_fast/old.py"} & set(names)
    assert str(torch_requirement(wheel_metadata(wheel_of(small)))) == ">=2.10"


@compiled
def test_an_editable_install_replaces_what_is_in_place(small, tmp_path):
    """Compiled, without compiled modules, and compiled again: always what this install made, and why."""
    package = small / "ipt_fast"
    stale = [package / f"_C_cuda{suffix}" for suffix in (SUFFIX, ".abi3.so")]
    for pure in (False, True, False):
        for module in stale:
            module.write_bytes(b"old")
        environment = {"IPT_FAST_PURE": "1"} if pure else {"CMAKE_BUILD_TYPE": "None"}
        process = call_backend(small, "build_editable", tmp_path / str(pure), **environment)
        assert process.returncode == 0, process.stderr
        found = sorted(str(path.relative_to(small)) for path in package.glob("*.so"))
        assert found == ([] if pure else LIBRARIES)
        reason = package / "_why_pure.txt"
        assert reason.read_text() == "IPT_FAST_PURE is set\n" if pure else not reason.exists()
        (wheel,) = (tmp_path / str(pure)).glob("*.whl")
        torch_allowed = torch_requirement(wheel_metadata(wheel))
        assert torch_allowed.contains("2.10.0") == (pure or torch.__version__.startswith("2.10."))


def links(page):
    """The files that a Markdown page links to."""
    return {link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text_of(page)) if "://" not in link}


def test_source_distribution(tmp_path):
    """It has all that builds, tests and is linked to, nothing that was built, and promises nothing of one torch."""
    checkout = copy_sources(tmp_path / "checkout")
    (checkout / f"ipt_fast/_C{SUFFIX}").touch()
    (checkout / "ipt_fast/_why_pure.txt").touch()
    process = call_backend(checkout, "build_sdist", tmp_path / "dist")
    assert process.returncode == 0, process.stderr
    (archive,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.glob("ipt_fast-*")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode == 0:
        left_out = {name for name in tracked.stdout.split("\n") if name and not (folder / name).exists()}
        assert {name for name in left_out if not name.startswith(".ci/") and (ROOT / name).exists()} == set()
    assert not list(folder.rglob("*.so")) and not list(folder.rglob("_why_pure.txt"))
    for page in [folder / "README.md", folder / "CONTRIBUTING.md", *(folder / "docs").glob("*.md")]:
        for link in links(page):
            assert (page.parent / link).exists(), (page.name, link)
    fields = metadata((folder / "PKG-INFO").read_text())
    assert str(torch_requirement(fields)) == ">=2.10"
    assert fields["License-Expression"] or fields["License"] == "Apache-2.0"


@compiled
@pytest.mark.skipif(shutil.which("nm") is None, reason="there is no nm")
@pytest.mark.parametrize(("level", "flags"), sorted(_extension.build_info().get("cpu_isa", {}).items()))
def test_kernels_have_no_weak_symbols(level, flags, small, tmp_path):
    """The linker merges weak symbols, so code of one level would run in place of another's. Without the optimizer,
    which inlines most of them, all show."""
    definitions = [f"-DIPT_FAST_LEVEL={level}", f'-DIPT_FAST_VECTORS="vec_{level}.h"']
    (generated, *_) = small.glob("build/cmake-*/generated")
    options = ["-std=c++20", "-O0", "-fPIC", "-w", *definitions, *flags.split(), "-Icsrc", f"-I{generated}"]

    def compile_and_read(source):
        target = tmp_path / f"{source.stem}.o"
        succeed("g++", *options, "-c", str(source), "-o", str(target), cwd=ROOT)
        return weak_symbols(target)

    with ThreadPoolExecutor(2) as pool:
        sources = sorted((ROOT / "csrc/cpu").glob("*_kernel.cpp"))
        found = list(pool.map(compile_and_read, sources))
    assert len(sources) >= 9 and [symbol for symbols in found for symbol in symbols] == []


def weak_symbols(target):
    """The weak symbols of an object file, but for the compiler's own."""
    lines = succeed("nm", "-C", "--defined-only", str(target)).splitlines()
    weak = [line.split(maxsplit=2) for line in lines]
    return [name for _, kind, name in weak if kind in "WwVvu" and not name.startswith("DW.ref.")]


# Below, everything is compiled and installed as users do.


def make_wheel(checkout, *arguments, **environment):
    """`make wheel` in this environment, which has torch, whoever made it."""
    command = ("make", "-o", f"{sys.prefix}/.torch", "wheel", f"VENV={sys.prefix}", *arguments)
    succeed(*command, cwd=checkout, timeout=3000, **(UNSET | environment))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkout after `make wheel`."""
    checkout = copy_sources(tmp_path_factory.mktemp("made") / "checkout")
    make_wheel(checkout)
    return checkout


@pytest.fixture(scope="module")
def made_libraries(made):
    (wheel,) = made.glob("dist/cpu/*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in library_names(archive.namelist())}


def check_installed(environment):
    """The kernels run in this environment, and nothing of its package comes from a checkout; its compiled modules."""
    said = environment.succeed(
        "python",
        "-c",
        "import torch, ipt_fast; from ipt_fast import _extension as e; print(ipt_fast.__file__, e.error(), e.isa());"
        "x = torch.rand(1, 8, 16, 16); w = torch.ones(8)\n"
        "with ipt_fast.use_backend('cpu'): y = ipt_fast.ops.layer_norm_2d(x, w, None)\n"
        "with ipt_fast.use_backend('reference'): z = ipt_fast.ops.layer_norm_2d(x, w, None)\n"
        "torch.testing.assert_close(y, z)",
    )
    assert str(environment.site) in said and f"None {_extension.isa()}" in said
    assert "ipt-fast" in environment.succeed("pip", "list")
    assert "No broken requirements" in environment.succeed("pip", "check")
    assert f"torch {torch.__version__}" in environment.succeed("ipt-fast", "info")
    return installed_libraries(environment)


def installed_libraries(environment):
    return {f"ipt_fast/{path.name}": path.read_bytes() for path in (environment.site / "ipt_fast").glob("*.so")}


@compiled
@pytest.mark.slow
def test_made_wheel(made, made_libraries, tmp_path):
    assert sorted(made_libraries) == LIBRARIES
    environment = Environment(tmp_path / "environment")
    (wheel,) = made.glob("dist/cpu/*.whl")
    environment.succeed("pip", "install", str(wheel))  # torch may ask for a newer setuptools
    assert check_installed(environment) == made_libraries
    objects = sorted(made.glob("build/cmake-*/csrc/cpu/CMakeFiles/kernels_*.dir/*.o"))
    assert len(objects) >= 10 and [weak_symbols(path) for path in objects] == [[] for _ in objects]


@compiled
@pytest.mark.slow
def test_made_source_distribution(made, made_libraries, tmp_path):
    """Built in another folder beside torch in another folder, it gives the same modules, byte for byte."""
    environment = Environment(tmp_path / "environment")
    (archive,) = made.glob("dist/*.tar.gz")
    environment.succeed("pip", "install", "setuptools", "wheel", "cmake", "ninja")
    environment.succeed("pip", "install", "--no-build-isolation", str(archive))
    assert check_installed(environment) == made_libraries


@compiled
@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/install.md"])
def test_documented_install(page, tmp_path):
    """The first command of the page, in an environment as `python -m venv` makes it and with torch."""
    checkout = copy_small_sources(tmp_path / "checkout")
    (command, *_) = re.findall(r"^(pip install .*?) *(?:#.*)?$", (ROOT / page).read_text(), re.MULTILINE)
    environment = Environment(tmp_path / "environment")
    environment.succeed("bash", "-c", command, cwd=checkout)
    assert sorted(installed_libraries(environment)) == LIBRARIES
    assert "None" in environment.succeed("python", "-c", "from ipt_fast import _extension as e; print(e.error())")


@pytest.mark.slow
def test_old_setuptools_alone(tmp_path):
    """Without the package wheel: one sentence that names the command."""
    environment = Environment(tmp_path / "environment")
    version = environment.run("python", "-c", "import setuptools; print(setuptools.__version__)").stdout.strip()
    if not version or tuple(map(int, version.split(".")[:2])) >= (70, 1):
        pytest.skip("this Python's environments have a setuptools that needs no other package, or none")
    process = environment.run("pip", "install", "--no-build-isolation", ".", cwd=copy_sources(tmp_path / "checkout"))
    said = process.stdout + process.stderr
    assert process.returncode != 0 and "without the package wheel" in said
    assert "pip install setuptools wheel cmake ninja && pip install --no-build-isolation ." in said
    assert "Traceback" not in said and "project.license" not in said


@compiled
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
def test_made_cuda_wheel(tmp_path):
    """With the CUDA kernels, which load where there is no GPU, beside few of the CPU's."""
    checkout = copy_small_sources(tmp_path / "checkout")
    make_wheel(checkout, "PARTS=cpu,cuda", TORCH_CUDA_ARCH_LIST="8.0")
    (wheel,) = checkout.glob("dist/cpu,cuda/*.whl")
    environment = Environment(tmp_path / "environment")
    environment.succeed("pip", "install", str(wheel))  # torch may ask for a newer setuptools
    script = "from ipt_fast import _extension as e; print(e.error(), e.cuda_error())"
    assert environment.succeed("python", "-c", script).splitlines()[-1] == "None None"
    libraries = installed_libraries(environment)
    assert sorted(libraries) == [LIBRARIES[0], "ipt_fast/_C_cuda.abi3.so", LIBRARIES[1]]
    for path in (checkout, Path(torch.__file__).parent):
        assert not any(str(path).encode() in content for content in libraries.values())
