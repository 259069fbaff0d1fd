"""``compute-sanitizer python -m tests.gpu.sanitized``: every kernel once on small, odd maps, forward and backward."""

import torch

import ipt_fast
from ipt_fast import _extension
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
    ipt_layers()
    if reason := _extension.cuda_error():
        print(f"left out: {reason}")
    else:
        cuda_kernels()
    torch.cuda.synchronize()


def ipt_layers():
    model = ipt_fast.create_model("ipt_tiny", layers=1).cuda()
    for autocast in (False, True):
        with ipt_fast.use_backend("triton"), torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            model(255 * torch.rand(2, 3, 48, 48, device="cuda"), "derain").mean().backward()


def cuda_kernels():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for name in cuda_cases.SIZES:
            operator, tensors, options = cuda_cases.build(name, dtype)
            with ipt_fast.use_backend("cuda"), torch.no_grad():
                out = getattr(ipt_fast.ops, operator)(**tensors, **options)
            if operator in cases.MERGES:
                with ipt_fast.use_backend("cuda"):
                    cases.forward_and_gradients(
                        getattr(ipt_fast.ops, operator), tensors, options, torch.randn_like(out)
                    )
        for size in (3, 5):
            cuda_cases.check_depthwise(72, size, 17, 19, dtype)


if __name__ == "__main__":
    main()
