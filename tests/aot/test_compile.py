"""Every Triton kernel compiles for GPUs that are not here, fits their shared memory and, by default, spills nothing."""

import functools
import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is not installed (pip install ipt-fast[triton])")

from tests.aot.ahead_of_time import SHARED_MEMORY  # noqa: E402, needs Triton

OPERATORS = [
    "layer_norm_2d", "add_layer_norm", "channel_attention", "focal_channel_attention", "grid_attention", "leffn",
    "merge_pointwise", "merge_depthwise", "focal_attention_layer", "grid_attention_layer", "leffn_layer",
    "window_attention", "window_attention_layer", "channel_attention_layer", "feed_forward_layer",
    "depthwise_layer", "gated_projection", "pointwise_layer",
]  # fmt: skip


@functools.cache
def compiled(pattern, *options):
    """What tests.aot.ahead_of_time found, in a process of its own: none may have the interpreter on."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.aot.ahead_of_time", pattern, *options]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout)


def check(found, default):
    assert found
    for kernel in found:
        assert kernel["shared"] <= SHARED_MEMORY[kernel["capability"]], kernel
        assert not default or kernel["spills"] == 0, kernel


def test_the_narrowest_model_on_hopper():
    # One process for all: most of the time of one is its start, and operators share kernels.
    check(compiled(f"^({'|'.join(OPERATORS)}) .*bfloat16", "--capability", "90", "--narrow"), default=True)


def test_the_narrowest_modulated_layers_on_hopper():
    check(compiled("_layer modulated 32 .*bfloat16", "--capability", "90"), default=True)


@pytest.mark.slow
@pytest.mark.parametrize("choice", range(4))
@pytest.mark.parametrize("operator", OPERATORS)
def test_every_configuration_on_every_chip(operator, choice):
    check(compiled(f"^{operator} ", "--choice", str(choice)), default=choice == 0)
