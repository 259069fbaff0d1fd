"""Products of tiles and conversions to fp32, as all kernels make them."""

import triton
import triton.language as tl

from ._launch import INTERPRETED

# The interpreter holds bf16 as 16-bit integers, and its tl.dot would multiply those.
WIDEN = tl.constexpr(INTERPRETED)


@triton.jit
def dot(b_a, b_b, b_sum, PRECISION: tl.constexpr):
    """b_sum + b_a @ b_b, sums in fp32; ``PRECISION``: of fp32 factors, from `_launch.precision`."""
    if WIDEN:
        b_a = b_a.to(tl.float32)
        b_b = b_b.to(tl.float32)
    return tl.dot(b_a, b_b, b_sum, input_precision=PRECISION)


@triton.jit
def widened(b_x):
    # in fp32; two values of bf16 by one instruction each, where the compiler takes three
    if WIDEN or b_x.dtype != tl.bfloat16:
        b_y = b_x.to(tl.float32)
    else:
        b_y = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [b_x],
            dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    return b_y
