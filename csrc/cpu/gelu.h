// The exact GELU, x * Phi(x) with the normal distribution Phi, and its slope Phi(x) + x * phi(x).
//
// With t = |x| and q(t) = Phi(-t), which beyond t = 5.5 is zero to fp32's digits:
//   gelu(x) = max(x, 0) - t * q(t), to 2.2e-7 * |x|;  slope(x) = s if x < 0 else 1 - s, s = q(t) - t * phi(t), to 4e-7.
//
// At levels that can look up values, there are 32 intervals around t = 0, 1 / scale, 2 / scale, ..., and in each of
// them q is a polynomial of u = t * scale - rounded, -1/2 <= u <= 1/2, which interpolates at the Chebyshev nodes; that
// of the last interval is zero. One coefficient of all intervals fills two registers, so one permutation reads that of
// 16 lanes. At the other levels, q is one polynomial of y = 2 t / limit - 1: the least-squares fit on 400 Chebyshev
// nodes (numpy.polynomial.chebyshev: chebfit, cheb2poly).
#pragma once

#include "vec.h"

namespace ipt_fast::cpu {
namespace {

// Coefficients of u^0, u^1, ... in each interval.
template <int degree>
struct Lookup {
    float scale, limit;  // limit = 31 / scale
    alignas(64) float coefficients[degree + 1][32];

    inline __attribute__((always_inline)) Vec operator()(Vec t) const {
        const Vec shifter = broadcast(0x1.8p23f);  // adding it rounds to an integer, which the low bits then hold
        const Vec shifted = fma(t, broadcast(scale), shifter);
        const Vec u = fma(t, broadcast(scale), shifter - shifted);
        Vec sum = at(degree, shifted);
#pragma GCC unroll 4
        for (int k = degree - 1; k >= 0; --k) {
            sum = fma(sum, u, at(k, shifted));
        }
        return sum;
    }

    inline __attribute__((always_inline)) Vec at(int k, Vec shifted) const { return look_up(coefficients[k], shifted); }
};

constexpr Lookup<3> kLookup = {
    5.75f,
    31 / 5.75f,
    {
        {
            5.0e-1f,       4.3096697e-1f, 3.639855e-1f,  3.0092615e-1f, 2.433235e-1f, 1.9226919e-1f, 1.4836356e-1f,
            1.1172779e-1f, 8.206665e-2f,  5.8766004e-2f, 4.100591e-2f,  2.787122e-2f, 1.8445995e-2f, 1.1883624e-2f,
            7.450326e-3f,  4.5443624e-3f, 2.6961572e-3f, 1.5556259e-3f, 8.727199e-4f, 4.7597496e-4f, 2.5233038e-4f,
            1.3000914e-4f, 6.5094646e-5f, 3.1669166e-5f, 1.4969422e-5f, 6.874031e-6f, 3.0663393e-6f, 1.3286134e-6f,
            5.59135e-7f,   2.285319e-7f,  9.07118e-8f,   0.0f,
        },
        {
            -6.938125e-2f,  -6.833991e-2f,  -6.53087e-2f,   -6.055251e-2f,  -5.4470044e-2f, -4.7538746e-2f,
            -4.0253364e-2f, -3.3069e-2f,    -2.6357511e-2f, -2.0382252e-2f, -1.5292002e-2f, -1.1131173e-2f,
            -7.861075e-3f,  -5.386261e-3f,  -3.5806114e-3f, -2.3093587e-3f, -1.4450738e-3f, -8.7730977e-4f,
            -5.167498e-4f,  -2.9530583e-4f, -1.6372993e-4f, -8.807414e-5f,  -4.5965622e-5f, -2.3274595e-5f,
            -1.1433928e-5f, -5.4497054e-6f, -2.5200834e-6f, -1.1306314e-6f, -4.921431e-7f,  -2.0783848e-7f,
            -8.5157865e-8f, 0.0f,
        },
        {
            0.0f,          1.031564e-3f,  1.971731e-3f,  2.742467e-3f,  3.2897552e-3f, 3.5895337e-3f, 3.648083e-3f,
            3.4973403e-3f, 3.1866708e-3f, 2.77318e-3f,   2.312623e-3f,  1.8524555e-3f, 1.4278006e-3f, 1.0603319e-3f,
            7.5948576e-4f, 5.2511797e-4f, 3.507039e-4f,  2.2636297e-4f, 1.4126864e-4f, 8.527555e-5f,  4.980575e-5f,
            2.815323e-5f,  1.5405361e-5f, 8.162031e-6f,  4.187778e-6f,  2.0811108e-6f, 1.0018257e-6f, 4.6722602e-7f,
            2.1112832e-7f, 9.244692e-8f,  3.9228567e-8f, 0.0f,
        },
        {
            3.4935167e-4f,  3.337121e-4f,   2.8910392e-4f,  2.2198584e-4f,  1.416682e-4f,   5.8525213e-5f,
            -1.7848528e-5f, -8.012334e-5f,  -1.2408309e-4f, -1.4875084e-4f, -1.558922e-4f,  -1.4912436e-4f,
            -1.3290266e-4f, -1.1162003e-4f, -8.8969486e-5f, -6.7618916e-5f, -4.9164544e-5f, -3.4279627e-5f,
            -2.2961927e-5f, -1.4797202e-5f, -9.184048e-6f,  -5.4949414e-6f, -3.1716634e-6f, -1.767148e-6f,
            -9.509225e-7f,  -4.944183e-7f,  -2.484763e-7f,  -1.2074194e-7f, -5.6746305e-8f, -2.580071e-8f,
            -1.1351048e-8f, 0.0f,
        },
    },
};

// Coefficients of y^degree, ..., y, 1.
template <int degree>
struct Polynomial {
    float limit;
    float coefficients[degree + 1];

    inline __attribute__((always_inline)) Vec operator()(Vec t) const {
        const Vec y = fma(t, broadcast(2.0f / limit), broadcast(-1.0f));
        Vec sum = broadcast(coefficients[0]);
#pragma GCC unroll 18
        for (int k = 1; k <= degree; ++k) {
            sum = fma(sum, y, broadcast(coefficients[k]));
        }
        return sum;
    }
};

constexpr Polynomial<15> kPolynomial = {
    5.5f,
    {
        -6.9243126e-3f,
        6.5825125e-3f,
        3.4255352e-2f,
        -4.730745e-2f,
        -5.4019213e-2f,
        1.3767426e-1f,
        -3.1998005e-2f,
        -1.6563135e-1f,
        2.1754415e-1f,
        -5.0648604e-2f,
        -1.7703423e-1f,
        2.7178788e-1f,
        -2.0681581e-1f,
        9.456302e-2f,
        -2.5007952e-2f,
        2.9797337e-3f,
    },
};

// q(t) at this level.
constexpr auto kTail = [] {
    if constexpr (kLooksUp) {
        return kLookup;
    } else {
        return kPolynomial;
    }
}();

// |x|, at most `limit`; NaN stays NaN, here and below.
inline Vec magnitude(Vec x, float limit) { return min(broadcast(limit), (Vec)((Bits)x & 0x7fffffff)); }

inline Vec gelu(Vec x) {
    const Vec t = magnitude(x, kTail.limit);
    return fma(-t, kTail(t), max(Vec{}, x));
}

// Of a map that is the result: of -infinity NaN, as PyTorch has it, so that what is not finite stays visible.
inline Vec gelu_of_result(Vec x) { return x < broadcast(-__FLT_MAX__) ? x - x : gelu(x); }

inline void gelu_with_slope(Vec x, Vec& value, Vec& slope) {
    const Vec t = magnitude(x, kTail.limit), far = magnitude(x, 15.0f);  // phi reaches farther than q
    const Vec q = kTail(t);
    const Vec s = fma(far * -0x1.988454p-2f, exp(far * far * -0.5f), q);  // 1 / sqrt(2 pi)
    value = fma(-t, q, max(Vec{}, x));
    slope = x < 0.0f ? s : 1.0f - s;
}

}  // namespace
}  // namespace ipt_fast::cpu
