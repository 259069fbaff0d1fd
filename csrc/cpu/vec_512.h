// What the levels with AVX-512 (F, BW, DQ, VL) have in common.
#pragma once

#include <immintrin.h>

#include "vec_types.h"

namespace ipt_fast::cpu {
namespace {

constexpr int kLanes = 16;
constexpr int kRegisters = 32;
constexpr bool kLooksUp = true;

using Vec = Lanes<float, kLanes>;
using Bits = Lanes<uint32_t, kLanes>;
using HalfBits = Lanes<uint16_t, kLanes>;

inline Vec fma(Vec a, Vec b, Vec c) { return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
inline Vec max(Vec a, Vec b) { return (Vec)_mm512_max_ps((__m512)a, (__m512)b); }
inline Vec min(Vec a, Vec b) { return (Vec)_mm512_min_ps((__m512)a, (__m512)b); }

inline Vec to_float(HalfBits h, Half) { return (Vec)_mm512_cvtph_ps((__m256i)h); }
inline HalfBits to_half(Vec v) { return (HalfBits)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT); }
inline HalfBits to_bf16(Vec v) { return round_to_bf16<kLanes>(v); }

inline __mmask16 first_lanes(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }

inline void load_part(Vec& raw, const void* p, int64_t count) {
    raw = (Vec)_mm512_maskz_loadu_ps(first_lanes(count), p);
}
inline void load_part(HalfBits& raw, const void* p, int64_t count) {
    raw = (HalfBits)_mm256_maskz_loadu_epi16(first_lanes(count), p);
}
inline void store_part(void* p, Vec raw, int64_t count) { _mm512_mask_storeu_ps(p, first_lanes(count), (__m512)raw); }
inline void store_part(void* p, HalfBits raw, int64_t count) {
    _mm256_mask_storeu_epi16(p, first_lanes(count), (__m256i)raw);
}

// Lane i of the result is table[index], index the low five bits of lane i of `bits`; the table lies on a cache line.
inline Vec look_up(const float* table, Vec bits) {
    return (Vec)_mm512_permutex2var_ps(_mm512_load_ps(table), (__m512i)bits, _mm512_load_ps(table + 16));
}

}  // namespace
}  // namespace ipt_fast::cpu
