"""Where there are no compiled kernels, the package says why: by its reasons, once by a warning, and in the demo."""

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import ipt_fast
from benchmarks import demo
from ipt_fast import _extension
from ipt_fast.ops import _select

ROOT = Path(__file__).resolve().parents[2]
# Only what PYTHONPATH and the folder say, whatever this environment has installed.
HIDE = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in f.__module__]\n"
CALL = """
import torch, ipt_fast
ipt_fast.ops.layer_norm_2d(torch.rand(1, 4, 3, 3), torch.ones(4))
"""


def run(script, cwd, *options, **environment):
    environment = {k: v for k, v in (os.environ | environment).items() if k not in ("IPT_FAST_BACKEND",)}
    command = [sys.executable, *options, "-c", HIDE + script]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture
def source_tree(tmp_path):
    """The package as in a clone in which nothing is built: without compiled modules and with kernels/ beside it."""
    clone = tmp_path / "clone"
    for name in ("ipt_fast", "kernels"):
        shutil.copytree(
            ROOT / name, clone / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "_why_pure.txt")
        )
    return clone


@pytest.fixture
def installation(tmp_path):
    """The same package as an install lays it down, with a module in the place of the compiled kernels."""
    site = tmp_path / "site"
    shutil.copytree(ROOT / "ipt_fast", site / "ipt_fast", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copytree(ROOT / "kernels", site / "ipt_fast" / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    (site / "ipt_fast" / "_C.abi3.so").write_bytes(b"")
    return site


def test_a_source_tree_that_hides_the_installation_says_so(source_tree, installation):
    script = f"""
import torch, ipt_fast
table = ipt_fast.explain("leffn")["leffn"]
print(table["cpu"])
print(table["triton"])
for backend in ("cpu", "triton", "cuda"):
    try:
        with ipt_fast.use_backend(backend):
            {CALL.strip().splitlines()[-1]}
        print("ran")
    except RuntimeError as error:
        print("refused", backend, error)
"""
    done = run(script, source_tree, PYTHONPATH=str(installation))
    cpu, triton, *refused = done.stdout.strip().splitlines()
    assert str(source_tree / "ipt_fast") in cpu and str(installation / "ipt_fast") in cpu and "hides" in cpu
    assert "IPT_FAST_PURE" not in cpu
    if "Triton is not installed" not in triton:
        assert "hides" in triton
    assert [line.split()[:2] for line in refused] == [["refused", backend] for backend in ("cpu", "triton", "cuda")]


def test_kernels_of_another_copy_are_not_taken(source_tree, tmp_path):
    """As from an editable install of another clone, which serves Python in any folder."""
    other = tmp_path / "other"
    other.mkdir()
    for name in ("_C.py", "_C_cuda.py"):
        (other / name).write_text("raise SystemExit('loaded')\n")
    (other / "kernels").mkdir()
    (other / "kernels" / "__init__.py").write_text("raise SystemExit('loaded')\n")
    script = f"""
import importlib.util, sys, torch
class Finder:
    def find_spec(name, path=None, target=None):
        files = {{"ipt_fast._C": "_C.py", "ipt_fast._C_cuda": "_C_cuda.py", "ipt_fast.kernels": "kernels/__init__.py"}}
        file = files.get(name)
        return importlib.util.spec_from_file_location(name, {str(other)!r} + "/" + file) if file else None
sys.meta_path.append(Finder)
import ipt_fast
for backend, reason in ipt_fast.explain("leffn")["leffn"].items():
    print(backend, reason)
"""
    said = dict(line.split(" ", 1) for line in run(script, source_tree).stdout.splitlines())
    assert str(other / "_C.py") in said["cpu"] and str(source_tree) in said["cpu"]
    assert str(other / "_C_cuda.py") in said["cuda"]
    if "Triton is not installed" not in said["triton"]:
        assert str(other / "kernels") in said["triton"]


@pytest.mark.parametrize("options", [(), ("-W", "always")])
def test_one_warning_at_the_first_use(source_tree, options):
    done = run(CALL + CALL, source_tree, *options)
    assert done.stderr.count("ipt_fast runs as plain PyTorch here") == 1
    assert "not part of this installation" in done.stderr
    assert "<string>:" in done.stderr  # the line is the caller's


def test_no_warning_without_use_on_wish_and_when_filtered(source_tree):
    said = "ipt_fast runs as plain PyTorch"
    assert (
        said not in run("import ipt_fast; ipt_fast.create_model('ipt_v2_tiny'); ipt_fast.explain()", source_tree).stderr
    )
    assert said not in run(CALL, source_tree, IPT_FAST_PURE="1").stderr
    assert said not in run(CALL, source_tree, "-W", "ignore:ipt_fast runs as plain").stderr
    (source_tree / "ipt_fast" / "_why_pure.txt").write_text("IPT_FAST_PURE is set\n")
    assert said not in run(CALL, source_tree).stderr
    (source_tree / "ipt_fast" / "_why_pure.txt").write_text("cmake not found (pip install cmake ninja)\n")
    assert "cmake not found" in run(CALL, source_tree).stderr
    demanded = "import ipt_fast\nwith ipt_fast.use_backend('reference'):" + CALL.replace("\n", "\n    ")
    assert said not in run(demanded, source_tree).stderr


def test_a_model_of_tokens_warns_too(source_tree):
    script = "import torch, ipt_fast; ipt_fast.create_model('ipt_tiny').eval()(torch.rand(1, 3, 48, 48), 'derain')"
    assert run(script, source_tree).stderr.count("ipt_fast runs as plain PyTorch here") == 1


def test_a_library_for_another_torch_warns(source_tree):
    (source_tree / "ipt_fast" / "_C.abi3.so").write_bytes(b"")
    (source_tree / "ipt_fast" / "_build_info.py").write_text("def build_info():\n    return {'torch': '1.0.0'}\n")
    assert "was built for torch 1.0.0" in run(CALL, source_tree).stderr
    (source_tree / "ipt_fast" / "_build_info.py").write_text("import nothing_of_this_name\n")
    assert "cannot be loaded" in run(CALL, source_tree).stderr
    (source_tree / "ipt_fast" / "_build_info.py").unlink()
    assert "was built for torch an unknown version" in run(CALL, source_tree).stderr


@pytest.mark.skipif(not _extension.load(), reason=_extension.error() or "")
def test_a_library_of_another_version_warns():
    """Its functions do not take what the schemas say; torch would end a process in which the schemas came first."""
    script = """
from ipt_fast import _extension
schemas = _extension._declared["ipt_fast_cpu"]
(place,) = (i for i, (schema, _) in enumerate(schemas) if schema.startswith("layer_norm_2d("))
schemas[place] = schemas[place][0].replace(", bool centered", ""), None
"""
    said = run(script + CALL, ROOT).stderr
    assert "are not those of this version" in said and "ipt_fast_cpu::layer_norm_2d" in said


def test_a_gpu_without_any_kernel_warns(monkeypatch):
    monkeypatch.delenv("IPT_FAST_PURE", raising=False)
    monkeypatch.setattr(_extension, "WHY_PURE", Path("/nowhere"))
    monkeypatch.setattr(_extension, "cuda_error", lambda: "no CUDA kernels")
    monkeypatch.setattr(_extension, "triton_error", lambda: "Triton is not installed")
    _extension._reason_for_plain_gpu.cache_clear()
    _select._warn_once.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="plain PyTorch here.*Triton is not installed"):
            _select.warn_without_kernels("cuda")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            _select.warn_without_kernels("cuda")
            _select.warn_without_kernels("meta")
    finally:
        _extension._reason_for_plain_gpu.cache_clear()
        _select._warn_once.cache_clear()


@pytest.mark.parametrize("why", ["error", "environment"])
def test_the_demo_does_not_compare_plain_pytorch_with_itself(why, monkeypatch, tmp_path, capsys):
    if why == "error":
        monkeypatch.setattr(_extension, "error", lambda: "there is no compiler here")
    else:
        monkeypatch.setenv("IPT_FAST_BACKEND", "reference")
    monkeypatch.setattr(demo, "compare", lambda *_: pytest.fail("compared"))
    monkeypatch.setattr(ipt_fast, "restore", lambda image, *_, **__: image)
    monkeypatch.setattr(sys, "argv", ["demo", "--out", str(tmp_path)])
    demo.main()
    said = capsys.readouterr().out
    assert "not timed" in said and ("no compiler" if why == "error" else "IPT_FAST_BACKEND") in said
    assert (tmp_path / "comparison.png").exists() and torch.is_grad_enabled()
