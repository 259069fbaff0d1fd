// A vector of fp32 lanes as wide as the translation unit's flags allow, and its loads and stores in fp32, bf16, fp16.
// Everything has internal linkage: the linker must never merge code of two instruction sets.
#pragma once

#include <stdint.h>
#include <string.h>

#include "kernels.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace ipt_fast {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

using Vec = float __attribute__((vector_size(4 * kLanes)));
using IntVec = int32_t __attribute__((vector_size(4 * kLanes)));
using Bits = uint32_t __attribute__((vector_size(4 * kLanes)));
using HalfBits = uint16_t __attribute__((vector_size(2 * kLanes)));

struct BFloat16 {
    uint16_t bits;
};
struct Half {
    uint16_t bits;
};

// body(T{}) for the storage type.
template <typename Body>
inline auto with_type(DType dtype, const Body& body) {
    switch (dtype) {
        case DType::f32:
            return body(float{});
        case DType::bf16:
            return body(BFloat16{});
        default:
            return body(Half{});
    }
}

inline Vec broadcast(float value) { return value - Vec{}; }

// a * b + c, in one rounding where the instruction set has it.
#if defined(__AVX512F__)
inline Vec fma(Vec a, Vec b, Vec c) { return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
#elif defined(__AVX2__)
inline Vec fma(Vec a, Vec b, Vec c) { return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
#else
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
#endif

inline IntVec lane_index() {
    IntVec index;
    for (int i = 0; i < kLanes; ++i) {
        index[i] = i;
    }
    return index;
}

// Lanes of a (index below kLanes) and of b (kLanes and above).
inline Vec select(Vec a, Vec b, IntVec index) {
#if defined(__clang__)
    Vec out;
    for (int i = 0; i < kLanes; ++i) {
        out[i] = index[i] < kLanes ? a[index[i]] : b[index[i] - kLanes];
    }
    return out;
#else
    return __builtin_shuffle(a, b, index);
#endif
}

inline Vec sqrt(Vec v) {
    for (int i = 0; i < kLanes; ++i) {
        v[i] = __builtin_sqrtf(v[i]);
    }
    return v;
}

// The second where one of them is NaN.
#if defined(__AVX512F__)
inline Vec max(Vec a, Vec b) { return (Vec)_mm512_max_ps((__m512)a, (__m512)b); }
inline Vec min(Vec a, Vec b) { return (Vec)_mm512_min_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__)
inline Vec max(Vec a, Vec b) { return (Vec)_mm256_max_ps((__m256)a, (__m256)b); }
inline Vec min(Vec a, Vec b) { return (Vec)_mm256_min_ps((__m256)a, (__m256)b); }
#else
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
inline Vec min(Vec a, Vec b) { return a < b ? a : b; }
#endif

// e^x within two units in the last place; 0 below -87.3, e^88.7 above 88.7; NaN stays NaN.
inline Vec exp(Vec x) {
    const Vec clamped = x > broadcast(88.7f) ? broadcast(88.7f) : x;
    const Vec shifter = broadcast(0x1.8p23f);  // adding it rounds to an integer, which the low bits then hold
    const Vec shifted = fma(clamped, broadcast(0x1.715476p0f), shifter);
    const Vec n = shifted - shifter;
    const Vec r = fma(n, broadcast(-0x1.7f7d1cp-20f), fma(n, broadcast(-0x1.62e4p-1f), clamped));
    Vec y = broadcast(0x1.6850e4p-10f);
    y = fma(y, r, broadcast(0x1.123bccp-7f));
    y = fma(y, r, broadcast(0x1.555b98p-5f));
    y = fma(y, r, broadcast(0x1.55548ep-3f));
    y = fma(y, r, broadcast(0x1.fffff8p-2f));
    y = fma(fma(r * r, y, r), broadcast(1.0f), broadcast(1.0f));
    const Vec scaled = (Vec)((Bits)y + ((Bits)shifted << 23));
    return x < broadcast(-87.3f) ? Vec{} : x == x ? scaled : x;
}

inline Vec to_float(Vec v, float) { return v; }
inline Vec to_float(HalfBits h, BFloat16) { return (Vec)(__builtin_convertvector(h, Bits) << 16); }

inline HalfBits to_bf16(Vec v) {
    const Bits bits = (Bits)v;
    const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return __builtin_convertvector(v == v ? rounded : Bits{} + 0x7fc0, HalfBits);
}

#if defined(__AVX512F__)
inline Vec to_float(HalfBits h, Half) { return (Vec)_mm512_cvtph_ps((__m256i)h); }
inline HalfBits to_half(Vec v) { return (HalfBits)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(__AVX2__)
inline Vec to_float(HalfBits h, Half) { return (Vec)_mm256_cvtph_ps((__m128i)h); }
inline HalfBits to_half(Vec v) { return (HalfBits)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT); }
#else
inline Vec to_float(HalfBits h, Half) {
    const Bits wide = __builtin_convertvector(h, Bits);
    const Bits magnitude = (wide & 0x7fff) << 13;
    // Scaling by 2^112 moves the exponent's bias, and makes normal numbers of fp16's subnormal ones.
    const Bits finite = (Bits)((Vec)magnitude * 0x1p112f);
    const Bits special = magnitude | 0x7f800000;
    return (Vec)(((wide & 0x7c00) == 0x7c00 ? special : finite) | ((wide & 0x8000) << 16));
}

inline HalfBits to_half(Vec v) {
    const Bits bits = (Bits)v;
    const Bits magnitude = bits & 0x7fffffff;
    const Bits normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
    // Next to 0.5 one unit in the last place is 2^-24, that of fp16's subnormal numbers.
    const Bits subnormal = (Bits)((Vec)magnitude + 0.5f) - 0x3f000000;
    const Bits finite = magnitude < 0x38800000 ? subnormal : normal;
    const Bits special = magnitude > 0x7f800000 ? Bits{} + 0x7e00 : Bits{} + 0x7c00;
    return __builtin_convertvector((magnitude < 0x477ff000 ? finite : special) | ((bits >> 16) & 0x8000), HalfBits);
}
#endif

inline Vec from_float(Vec v, float) { return v; }
inline HalfBits from_float(Vec v, BFloat16) { return to_bf16(v); }
inline HalfBits from_float(Vec v, Half) { return to_half(v); }

// The first `count` (1 to kLanes) values from p as fp32; the other lanes are 0.
template <typename T>
inline Vec load(const T* p, int64_t count = kLanes) {
    decltype(from_float(Vec{}, T{})) raw{};
    memcpy(&raw, p, count * sizeof(T));
    return to_float(raw, T{});
}

template <typename T>
inline void store(T* p, Vec v, int64_t count = kLanes) {
    const auto raw = from_float(v, T{});
    memcpy(p, &raw, count * sizeof(T));
}

// body(first, count) for every vector of `size` values: count is kLanes, a constant, for all but a last partial one.
template <typename Body>
inline __attribute__((always_inline)) void for_vectors(int64_t size, const Body& body) {
    int64_t first = 0;
    for (; first + kLanes <= size; first += kLanes) {
        body(first, kLanes);
    }
    if (first < size) {
        body(first, size - first);
    }
}

// Lane j of the result is a[j] where j & s is 0 and b[j - s] elsewhere.
inline Vec interleave_low(Vec a, Vec b, int s) {
    const IntVec lane = lane_index();
    return select(a, b, (lane & s) == 0 ? lane : lane - s + kLanes);
}

// Lane j of the result is a[j + s] where j & s is 0 and b[j] elsewhere.
inline Vec interleave_high(Vec a, Vec b, int s) {
    const IntVec lane = lane_index();
    return select(a, b, (lane & s) == 0 ? lane + s : lane + kLanes);
}

// rows[i][j] -> rows[j][i]: in stage s, blocks of s by s lanes change places across the diagonal.
inline void transpose(Vec (&rows)[kLanes]) {
#pragma GCC unroll 4
    for (int s = 1; s < kLanes; s *= 2) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
            if ((i & s) == 0) {
                const Vec a = rows[i], b = rows[i + s];
                rows[i] = interleave_low(a, b, s);
                rows[i + s] = interleave_high(a, b, s);
            }
        }
    }
}

// Lane i of the result is the sum of the lanes of rows[i]: the transposition's network, adding at every stage.
inline Vec sum_each(Vec (&rows)[kLanes]) {
#pragma GCC unroll 4
    for (int s = 1; s < kLanes; s *= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < kLanes / (2 * s); ++i) {
            const Vec a = rows[2 * i], b = rows[2 * i + 1];
            rows[i] = interleave_low(a, b, s) + interleave_high(a, b, s);
        }
    }
    return rows[0];
}

// The sum and the largest of the lanes.
inline float sum(Vec v) {
    for (int s = kLanes / 2; s > 0; s /= 2) {
        v += select(v, v, (lane_index() + s) & (kLanes - 1));
    }
    return v[0];
}

inline float largest(Vec v) {
    for (int s = kLanes / 2; s > 0; s /= 2) {
        v = max(v, select(v, v, (lane_index() + s) & (kLanes - 1)));
    }
    return v[0];
}

}  // namespace
}  // namespace ipt_fast
