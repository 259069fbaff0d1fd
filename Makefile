# Every target does its own set-up: from a bare clone, `make demo` is enough.
PYTHON ?= python3
TORCH  ?= torch==2.13.0
# So many tests run side by side, those of a file in one process, with a thread each: their kernels are small.
THREADS ?= $(shell n=$$(nproc); [ $$n -lt 4 ] && echo $$n || echo 4)

# The benchmark photos, where they are at hand; tests and demo make do without.
ifneq ($(wildcard ../shared/data),)
export IPT_FAST_DATA ?= $(abspath ../shared/data)
endif

VENV   := .venv
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip
CSRC   := $(shell find csrc -type f)
CXX_SOURCES := $(filter %.h %.cpp %.cuh %.cu,$(CSRC))

.PHONY: demo test bench gpu-check gpu-bundle sanitize wheel lint clean

demo: $(VENV)/.installed
	$(PY) -m benchmarks.demo

test: $(VENV)/.installed $(VENV)/.oracles
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(THREADS) --dist loadfile --no-loadscope-reorder

bench: $(VENV)/.installed
	$(PY) -m benchmarks

# On a machine with an NVIDIA GPU, with the Python, torch and triton that are there; nothing is downloaded. Results go to
# OUT; ONLY is a regular expression of operators, for a second, shorter run (docs/gpu.md).
OUT  ?= build/gpu-check
ONLY ?=
gpu-check:
	$(PYTHON) -m benchmarks.gpu_check --out "$(OUT)" $(if $(ONLY),--only "$(ONLY)")

# One folder with all that the check needs, the CUDA library included, to be taken to such a machine.
gpu-bundle: $(VENV)/.installed
	$(PY) -m benchmarks.gpu.bundle build/gpu-bundle

# The kernels' tests with every access and every undefined operation checked, on a build of its own.
SANITIZE := -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
# A process loads such a module only after the sanitizer's library.
sanitize: $(VENV)/.installed
	preload="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)"; \
	IPT_FAST_PRELOAD="$$preload" ASAN_OPTIONS=detect_leaks=0 CMAKE_BUILD_TYPE=None CXXFLAGS="$(SANITIZE)" \
	    $(PY) setup.py -q build --build-lib build/sanitize && \
	LD_PRELOAD="$$preload" \
	    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=$(THREADS) \
	    $(PY) -m pytest -o pythonpath="build/sanitize ." tests/ops tests/build/test_extension_layer_norm.py

# For this Python and this torch: dist/cpu/*.whl, or with PARTS=cpu,cuda (nvcc is needed) dist/cpu,cuda/*.whl; and
# dist/*.tar.gz, which builds anywhere.
PARTS ?= cpu
wheel: $(VENV)/.torch
	IPT_FAST_BUILD=$(PARTS) $(PIP) wheel --no-build-isolation --no-deps -w dist/$(PARTS) .
	$(PY) setup.py -q sdist --dist-dir dist

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_SOURCES)

clean:
	rm -rf build dist *.egg-info ipt_fast/*.so ipt_fast/_why_pure.txt

# torch first: the extension is compiled against it, so pip must not isolate the build.
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "ipt-fast needs Python 3.11 or newer, '$(PYTHON)' is older: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' || \
	    { echo "'$(PYTHON)' cannot make virtual environments: install its venv module (apt-get install python3-venv)"; exit 1; }
	[ -x $(PY) ] || $(PYTHON) -m venv $(VENV)
	$(PIP) install "$(TORCH)"
	$(PIP) install setuptools wheel cmake ninja
	@touch $@

$(VENV)/.installed: $(VENV)/.torch setup.py CMakeLists.txt pyproject.toml $(CSRC)
	$(PIP) install --no-build-isolation -e ".[dev]"
	@$(PY) -c 'from ipt_fast import _extension as e; print("compiled kernels:", e.error() or f"ready ({e.isa()})")'
	@touch $@

# Other people's implementations to compare with, runtimes to export to, tools that change models from outside. Tests
# that need them are skipped where they cannot be had.
$(VENV)/.oracles: $(VENV)/.torch
	-$(PIP) install --retries 1 --no-deps torchvision==0.28.0 spandrel spandrel_extra_arches timm && \
	    $(PIP) install --no-deps lpips && \
	    $(PIP) install einops onnx onnxscript onnxruntime openvino accelerate peft torchao tensorboard scipy diffusers "ray[data]>=2.60" && \
	    touch $@
