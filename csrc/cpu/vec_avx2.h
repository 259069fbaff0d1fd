// Vectors of AVX2 with FMA and F16C.
#pragma once

#include <immintrin.h>

#include "vec_types.h"

namespace ipt_fast::cpu {
namespace {

constexpr int kLanes = 8;
constexpr int kRegisters = 16;
constexpr bool kMatrixUnit = false;
constexpr bool kLooksUp = false;

using Vec = Lanes<float, kLanes>;
using Bits = Lanes<uint32_t, kLanes>;
using HalfBits = Lanes<uint16_t, kLanes>;

inline Vec fma(Vec a, Vec b, Vec c) { return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
inline Vec max(Vec a, Vec b) { return (Vec)_mm256_max_ps((__m256)a, (__m256)b); }
inline Vec min(Vec a, Vec b) { return (Vec)_mm256_min_ps((__m256)a, (__m256)b); }

inline Vec to_float(HalfBits h, Half) { return (Vec)_mm256_cvtph_ps((__m128i)h); }
inline HalfBits to_half(Vec v) { return (HalfBits)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT); }
inline HalfBits to_bf16(Vec v) { return round_to_bf16<kLanes>(v); }

// There are no masks for 16 bits.
inline __m256i first_lanes(int64_t count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline void load_part(Vec& raw, const void* p, int64_t count) {
    raw = (Vec)_mm256_maskload_ps(static_cast<const float*>(p), first_lanes(count));
}
inline void store_part(void* p, Vec raw, int64_t count) {
    _mm256_maskstore_ps(static_cast<float*>(p), first_lanes(count), (__m256)raw);
}

}  // namespace
}  // namespace ipt_fast::cpu

#include "vec_no_dots.h"
