"""``compute-sanitizer python -m tests.gpu.sanitized``: every kernel once on small, odd maps, forward and backward."""

import torch

import ipt_fast
from tests.cuda import cases as cuda_cases
from tests.ops import cases


def main():
    cases.DEVICE = "cuda"
    torch.manual_seed(0)
    for call in cases.CALLS:
        for dtype in (torch.float32, torch.bfloat16):
            operator, tensors, options = cases.build(call, (2, 7, 13), dtype)
            grad = torch.randn_like(cases.public(operator, tensors, options))
            with ipt_fast.use_backend("triton"):
                cases.forward_and_gradients(getattr(ipt_fast.ops, operator), tensors, options, grad)
    for name in cuda_cases.SIZES:
        for dtype in (torch.float32, torch.bfloat16):
            operator, tensors, options = cuda_cases.build(name, dtype)
            if ipt_fast.explain(operator, **tensors, **options)[operator]["cuda"] is None:
                with ipt_fast.use_backend("cuda"), torch.no_grad():
                    getattr(ipt_fast.ops, operator)(**tensors, **options)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
