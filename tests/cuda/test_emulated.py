"""The CUDA kernels with their threads emulated on the CPU: all that a GPU would compute, without one."""

import os
import re
import subprocess
import sys

import pytest
import torch

import ipt_fast
from tests.cuda import emulated

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="there is no C++ compiler")


@pytest.fixture(scope="module")
def environment():
    return {**os.environ, "IPT_FAST_EMULATED_CUDA": str(emulated.build()), "OMP_NUM_THREADS": "1"}


def run(environment, *command):
    result = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    return result.stdout


def test_parity(environment):
    said = run(environment, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/cuda/parity.py")
    assert int(re.search(r"(\d+) passed", said)[1]) > 50


BROKEN = r"""
#include "cuda/device.cuh"
namespace ipt_fast::cuda {
struct Params { float* out; int fault; };
void kernel(const Params p) {
    float* shared = shared_memory<float>();
    const int i = thread_index();
    shared[i] = (float)i;
    if (p.fault != 1) { sync_block(); }
    if (p.fault == 2 && i == 3) { return; }
    if (p.fault == 3 && i == 3) { shuffle(1.0f, 0); } else { sync_warp(); }
    if (p.fault == 4) { copy_async(shared, p.out, true); copy_commit(); }
    if (p.fault == 5) { uint32_t words[4]; load_matrices(words, shared + 1); }
    p.out[i] = shared[(i + 33) % 64];
    sync_block();
}
}
#include <stdio.h>
#include <exception>
int main() {
    using namespace ipt_fast::cuda;
    for (int fault = 0; fault < 6; ++fault) {
        alignas(16) float forward[64], backward[64];
        try {
            emulator::set_reversed(false);
            launch(kernel, Params{forward, fault}, {1, 64, 4096, nullptr});
            emulator::set_reversed(true);
            launch(kernel, Params{backward, fault}, {1, 64, 4096, nullptr});
            printf("%d: %s\n", fault, memcmp(forward, backward, sizeof forward) ? "differs" : "same");
        } catch (const std::exception& error) {
            printf("%d: %s\n", fault, error.what());
        }
    }
}
"""


def test_the_emulator_finds_mistakes(tmp_path):
    (tmp_path / "broken.cpp").write_text(BROKEN)
    sources = [tmp_path / "broken.cpp", emulated.SOURCES / "emulator.cpp"]
    command = [
        emulated.compiler(),
        "-std=c++20",
        "-O1",
        "-U_FORTIFY_SOURCE",
        "-I",
        emulated.HEADERS,
        "-o",
        tmp_path / "broken",
        *sources,
    ]
    subprocess.run(command, check=True)
    said = subprocess.run([tmp_path / "broken"], capture_output=True, text=True, check=True).stdout.splitlines()
    assert said[0] == "0: same" and said[1] == "1: differs"
    for fault, words in {2: "wait for others", 3: "different collectives", 4: "did not wait", 5: "not aligned"}.items():
        assert words in said[fault]


AXES = r"""
#include <stdio.h>
#include "cuda/focal_attention_layer.cuh"
#include "common/windows.h"
using namespace ipt_fast::cuda;
// Windows of both branches, pixel by pixel: the windows of branch 1 begin half a window later, cyclically.
int main() {
    long wrong = 0, blocks = 0;
    for (int size = 1; size < 70; ++size) {
        for (int window = 1; window < 40; ++window) {
            const ipt_fast::Axis cut = ipt_fast::Axis::windows_of(size, window, 2);
            const FocalAxis axis = {size, window, (int)cut.part, (int)cut.parts, (int)cut.windows(), (int)cut.blocks()};
            const int padded = axis.windows * window, shift = window / 2;
            int next = 0;
            for (int block = 0; block < axis.blocks; ++block, ++blocks) {
                wrong += axis.begin(block) != next || axis.end(block) <= next;
                next = axis.end(block);
                for (int branch = 0; branch < 2; ++branch) {
                    for (int pixel = axis.begin(block); pixel < next; ++pixel) {
                        const int shifted = (pixel - branch * shift + padded) % padded;
                        wrong += axis.window_of(branch, block) != shifted / window;
                        wrong += axis.position(branch, block) + pixel - axis.begin(block) != shifted % window;
                    }
                    int found = 0;
                    for (int i = 0; i < axis.parts; ++i) {
                        found += axis.block_of(branch, axis.window_of(branch, block), i) == block;
                    }
                    wrong += found != 1;
                }
            }
            wrong += next != size;
        }
    }
    printf("%ld wrong of %ld\n", wrong, blocks);
}
"""


def test_windows_of_the_focal_kernels(tmp_path):
    (tmp_path / "axes.cpp").write_text(AXES)
    command = [emulated.compiler(), "-std=c++20", "-O1", "-I", emulated.HEADERS, "-o", tmp_path / "axes"]
    subprocess.run([*command, tmp_path / "axes.cpp"], check=True)
    said = subprocess.run([tmp_path / "axes"], capture_output=True, text=True, check=True).stdout
    wrong, blocks = re.fullmatch(r"(\d+) wrong of (\d+)\n", said).groups()
    assert int(wrong) == 0 and int(blocks) > 10000


def test_a_library_that_cannot_be_loaded_says_why(tmp_path):
    (tmp_path / "broken.so").write_text("no library")
    code = "import ipt_fast; print(ipt_fast.explain('leffn')['leffn']['cuda'])"
    said = run({**os.environ, "IPT_FAST_EMULATED_CUDA": str(tmp_path / "broken.so")}, "-c", code)
    assert said.startswith("the CUDA kernels cannot be loaded: ") and ("invalid ELF" in said or "too short" in said)


def test_arguments_are_checked_before_anything_runs(environment):
    code = (
        "import torch, ipt_fast\n"
        "x, w = torch.randn(1, 40, 3, 5), torch.ones(40)\n"
        "weights = torch.randn(64, 40, 1, 1), torch.randn(64, 1, 5, 5), torch.randn(40, 64, 1, 1)\n"
        "print(ipt_fast.explain('leffn', x, *weights)['leffn']['cuda'])\n"
        "pair = w.view(40, 1, 1, 1), w.view(1, 40, 1, 1)\n"
        "print(ipt_fast.explain('merge_pointwise', *pair)['merge_pointwise']['cuda'])\n"
    )
    channels, merge = run(environment, "-c", code).splitlines()
    assert "32, 48, 64, 96 channels; these are 40" in channels and merge == "None"


def test_without_the_kernels_there_is_a_reason():
    reason = ipt_fast.explain("leffn")["leffn"]["cuda"]
    assert reason and (
        "not part of this installation" in reason or "no NVIDIA GPU" in reason or torch.cuda.is_available()
    )
