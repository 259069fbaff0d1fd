// Vectors of AVX-512 with products of bf16. Compiled without AVX512_BF16, its instructions are emulated, bit for bit:
// for tests, on processors that lack them.
#pragma once

#include "vec_512.h"

namespace ipt_fast::cpu {
namespace {

constexpr bool kMatrixUnit = true;  // of the level amx
constexpr bool kDots = true;

#if defined(__AVX512BF16__)

inline HalfBits to_factor(Vec v) { return (HalfBits)_mm512_cvtneps_pbh((__m512)v); }

inline Bits to_pairs(Vec low, Vec high) {
    using Halves = Lanes<uint16_t, 2 * kLanes>;
    constexpr Halves kOrder = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                               8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return (Bits)_mm512_permutexvar_epi16((__m512i)kOrder, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
}

inline Vec dot(Bits a, Bits b, Vec c) { return (Vec)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b); }

#else

inline Vec flush(Vec v) {  // of subnormal numbers
    return (Vec)(((Bits)v & 0x7f800000) == 0 ? (Bits)v & 0x80000000 : (Bits)v);
}

inline HalfBits to_factor(Vec v) {
    const Bits rounded = __builtin_convertvector(to_bf16(flush(v)), Bits), quiet = ((Bits)v >> 16) | 0x40;  // NaN
    return __builtin_convertvector(v == v ? rounded : quiet, HalfBits);
}

inline Bits to_pairs(Vec low, Vec high) {
    return __builtin_convertvector(to_factor(low), Bits) | __builtin_convertvector(to_factor(high), Bits) << 16;
}

inline Vec dot(Bits a, Bits b, Vec c) {
    const Vec low_a = flush((Vec)(a << 16)), low_b = flush((Vec)(b << 16));
    const Vec high_a = flush((Vec)(a & 0xffff0000)), high_b = flush((Vec)(b & 0xffff0000));
    return flush(fma(low_a, low_b, flush(fma(high_a, high_b, flush(c)))));
}

#endif

}  // namespace
}  // namespace ipt_fast::cpu
