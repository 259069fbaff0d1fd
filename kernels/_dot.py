"""Products of tiles, as all kernels make them."""

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
