"""Every CUDA C++ kernel once on a small, odd map, for compute-sanitizer to watch."""

import torch

import ipt_fast
from benchmarks.gpu import parity, stage
from tests.cuda import cases as cuda_cases
from tests.ops import cases


def main():
    args = stage.arguments(__doc__)
    if not args.rehearse:
        cases.DEVICE = "cuda"
    torch.manual_seed(0)
    count = 0
    for dtype in (torch.bfloat16, torch.float32):
        for name in cuda_cases.SIZES:
            if "large" not in name and args.only.search(parity.label_of(cuda_cases, name, dtype)):
                run(name, dtype)
                count += 1
                print(f"{name} {dtype}", flush=True)
            if args.rehearse and name == "leffn layer 32":
                return
        for size in (3, 5):
            cuda_cases.check_depthwise(72, size, 17, 19, dtype)
            print(f"depthwise {size} {dtype}", flush=True)
    if not count:
        raise SystemExit(f"no case matches {args.only.pattern!r}")


def run(name, dtype):
    operator, tensors, options = cuda_cases.build(name, dtype)
    function = getattr(ipt_fast.ops, operator)
    with ipt_fast.use_backend("cuda"):
        with torch.no_grad():
            out = function(**tensors, **options)
        if operator in cases.MERGES:
            cases.forward_and_gradients(function, tensors, options, torch.randn_like(out))
    if out.is_cuda:
        torch.cuda.synchronize()
    assert out.isfinite().all()


if __name__ == "__main__":
    main()
