"""GELU and its slope in fp32, for results of 16 bits by one power of two instead of erf.

Both come from t = |x| and a polynomial whose error was made as even as possible in units of fp16. Before the result is
rounded the error is at most 0.18 ulp of fp16, its subnormals included (the slope's 0.11 where it is 2^-6 and more), and
0.03 ulp of bf16 where the result is 2^-14 and more.
"""

import triton
import triton.language as tl


@triton.jit
def gelu(b_x, DTYPE: tl.constexpr):
    # x Phi(x) = max(x, 0) - t Phi(-t), with a polynomial for log2 Phi(-t)
    if tl.float32 == DTYPE:
        b_y = 0.5 * b_x * (1.0 + tl.erf(b_x * 0.7071067811865476))
    else:
        b_t = tl.abs(b_x)
        b_p = tl.fma(b_t, -0.000320505222, 0.00582722588)
        b_p = tl.fma(b_p, b_t, -0.0482370197)
        b_p = tl.fma(b_p, b_t, -0.4641213)
        b_p = tl.fma(b_p, b_t, -1.14917557)
        b_p = tl.fma(b_p, b_t, -1.00012085)
        # Beyond 16 the power is zero; infinity times it would be NaN, which is right of -infinity alone.
        b_y = tl.fma(-tl.abs(tl.minimum(b_x, 16.0)), tl.exp2(b_p), tl.maximum(b_x, 0.0))
    return b_y


@triton.jit
def gelu_slope(b_x, DTYPE: tl.constexpr):
    # Phi(x) + x phi(x): of -t it is phi(t) (Phi(-t) / phi(t) - t), with a polynomial for that factor, and of t the rest
    if tl.float32 == DTYPE:
        b_y = 0.5 + 0.5 * tl.erf(b_x * 0.7071067811865476) + b_x * tl.exp(-0.5 * b_x * b_x) * 0.3989422804014327
    else:
        b_t = tl.minimum(tl.abs(b_x), 16.0)  # beyond, the power is zero, and the polynomial must not be infinite
        b_p = tl.fma(b_t, -0.000108375012, 0.00168043806)
        b_p = tl.fma(b_p, b_t, -0.011305885)
        b_p = tl.fma(b_p, b_t, 0.0446709524)
        b_p = tl.fma(b_p, b_t, -0.120355712)
        b_p = tl.fma(b_p, b_t, 0.245167245)
        b_p = tl.fma(b_p, b_t, -0.79708745)
        b_p = tl.fma(b_p, b_t, 0.499974185)
        b_y = b_p * tl.exp2(b_x * b_x * -0.7213475204444817)
        b_y = tl.where(b_x < 0.0, b_y, 1.0 - b_y)
    return b_y
