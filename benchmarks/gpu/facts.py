"""Which card and which versions these are, whether a kernel of either kind runs at all, and what the card does at most.

``facts.json`` in the work folder tells the other stages.
"""

import json
import os
import platform

import torch

import ipt_fast
from benchmarks.gpu import device, stage
from ipt_fast import _extension


def main():
    args = stage.arguments(__doc__)
    facts = {"python": platform.python_version(), "cores": len(os.sched_getaffinity(0))} | described(args.rehearse)
    print(json.dumps(facts), flush=True)
    failures = []
    for backend in ("cuda", "triton"):
        with stage.reported(f"a first launch of {backend}", failures):
            print(f"{backend}: {first_launch(backend, args.rehearse)}", flush=True)
    (args.work / "facts.json").write_text(json.dumps(facts))
    raise SystemExit(bool(failures))


def described(rehearse):
    gpu = device.opened(rehearse)
    facts = stage.environment(gpu.name) | {"capability": gpu.capability}
    if rehearse:
        return facts | {"copy_bytes_per_s": 4e12, "product_flop_per_s": 7e14}
    properties = torch.cuda.get_device_properties(0)
    facts |= {
        "multiprocessors": properties.multi_processor_count,
        "gib": properties.total_memory / 2**30,
        "cuda": torch.version.cuda,
        "library": ipt_fast._extension.cuda_error() or "loaded",
    }
    return facts | ceilings(gpu)


def ceilings(gpu):
    """Of a large copy, read and written, and of a large bf16 product, on random data."""
    source = torch.rand(256 << 20, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    found = gpu.seconds({"copy": lambda: target.copy_(source), "product": lambda: a @ b}, rounds=5)
    return {
        "copy_bytes_per_s": 2 * source.numel() * 4 / found["copy"],
        "product_flop_per_s": 2 * 8192**3 / found["product"],
    }


def first_launch(backend, rehearse):
    """ "right", or an error: one merge of two weights."""
    if rehearse and backend == "triton":
        return f"not in a rehearsal ({_extension.triton_error() or 'the kernels can be imported'})"
    at = {"device": "cpu" if rehearse else "cuda"}
    first, second = torch.randn(64, 32, 1, 1, **at), torch.randn(128, 64, 1, 1, **at)
    with ipt_fast.use_backend(backend):
        merged = ipt_fast.ops.merge_pointwise(first, second)
    expected = second.double().flatten(1) @ first.double().flatten(1)
    error = (merged.double().flatten(1) - expected).abs().max() / expected.abs().max()
    assert error < 1e-5, f"error {error:.1e}"
    return "right"


if __name__ == "__main__":
    main()
