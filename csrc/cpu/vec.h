// A vector of fp32 lanes, its arithmetic, and its loads and stores in fp32, bf16, fp16. Everything has internal
// linkage: the linker must never merge code of two levels.
//
// What differs between levels is in the level's file, vec_<level>.h:
//   kLanes, kRegisters            fp32 values of a vector, vectors that registers hold
//   kMatrixUnit                   whether a level with these vectors has a matrix unit beside them (levels.cmake)
//   kLooksUp, look_up             whether one instruction reads any 16 of 32 values, and then that instruction
//   Vec, Bits, HalfBits           vectors of fp32, of 32 bits and of 16 bits
//   fma(a, b, c)                  a * b + c, in one rounding where the level has it
//   max(a, b), min(a, b)          the second where one of them is NaN
//   to_float(h, Half{}), to_half  fp16 to fp32 and back
//   to_bf16                       fp32 to bf16, to the nearest, ties to even
//   load_part, store_part         the first lanes of a vector of 32 or 16 bits, where the level has masks for them
//   kDots                         whether one instruction multiplies pairs of bf16, and then to_factor(v), which is
//                                 to_bf16 for products, to_pairs(low, high), and dot(a, b, c): c and the products of
//                                 the pairs' halves; vec_no_dots.h has them of the other levels
#pragma once

#include <stdint.h>
#include <string.h>

#include "kernels.h"
#include IPT_FAST_VECTORS

namespace ipt_fast::cpu {
namespace {

using IntVec = Lanes<int32_t, kLanes>;

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

inline Bits broadcast(Pair value) { return value.bits - Bits{}; }

// c + a b, of values and of pairs.
inline Vec add_product(Vec a, Vec b, Vec c) { return fma(a, b, c); }
inline Vec add_product(Bits a, Bits b, Vec c) { return dot(a, b, c); }

inline Vec to_float(Vec v, float) { return v; }
inline Vec to_float(HalfBits h, BFloat16) { return (Vec)(__builtin_convertvector(h, Bits) << 16); }

inline Vec from_float(Vec v, float) { return v; }
inline HalfBits from_float(Vec v, BFloat16) { return to_bf16(v); }
inline HalfBits from_float(Vec v, Half) { return to_half(v); }
inline HalfBits from_float(Vec v, Factor) { return to_factor(v); }

// The first `count` lanes from and to memory, as the levels do it that have no masks.
template <typename Raw>
inline void load_part(Raw& raw, const void* p, int64_t count) {
    raw = Raw{};
    memcpy(&raw, p, count * sizeof(raw[0]));
}
template <typename Raw>
inline void store_part(void* p, const Raw& raw, int64_t count) {
    memcpy(p, &raw, count * sizeof(raw[0]));
}

// The first `count` (1 to kLanes) values from p as fp32; the other lanes are 0. Always inlined, as is `store`: in large
// files the compiler would rather call them, and a call keeps nothing in registers.
template <typename T>
inline __attribute__((always_inline)) Vec load(const T* p, int64_t count = kLanes) {
    decltype(from_float(Vec{}, T{})) raw{};
    if (__builtin_constant_p(count)) {
        memcpy(&raw, p, count * sizeof(T));
    } else {
        load_part(raw, p, count);
    }
    return to_float(raw, T{});
}

template <typename T>
inline __attribute__((always_inline)) void store(T* p, Vec v, int64_t count = kLanes) {
    const auto raw = from_float(v, T{});
    if (__builtin_constant_p(count)) {
        memcpy(p, &raw, count * sizeof(T));
    } else {
        store_part(p, raw, count);
    }
}

inline Bits load(const Pair* p) {
    Bits raw;
    memcpy(&raw, p, sizeof(raw));
    return raw;
}

inline void store(Pair* p, Bits pairs) { memcpy(p, &pairs, sizeof(pairs)); }

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

// body(first, count) for vectors that cover `size` values; all have kLanes, a constant, if there are as many. The
// last one begins as early as it must.
template <typename Body>
inline __attribute__((always_inline)) void for_covering_vectors(int64_t size, const Body& body) {
    if (size < kLanes) {
        return body(0, size);
    }
    for (int64_t c = 0; c < size; c += kLanes) {
        body(c + kLanes <= size ? c : size - kLanes, kLanes);
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
}  // namespace ipt_fast::cpu
