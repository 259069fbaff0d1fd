// Vectors of NEON with products of bf16 (FEAT_BF16). Products and their sums are rounded to odd, and subnormal numbers
// are zero in them.
#pragma once

#include "vec_arm.h"

namespace ipt_fast::cpu {
namespace {

constexpr bool kDots = true;

inline HalfBits to_factor(Vec v) { return (HalfBits)vcvt_bf16_f32((float32x4_t)v); }

inline Bits to_pairs(Vec low, Vec high) {
    const bfloat16x8_t both = vcvtq_high_bf16_f32(vcvtq_low_bf16_f32((float32x4_t)low), (float32x4_t)high);
    const uint16x8_t halves = vreinterpretq_u16_bf16(both);
    return (Bits)vzip1q_u16(halves, vextq_u16(halves, halves, 4));
}

inline Vec dot(Bits a, Bits b, Vec c) { return (Vec)vbfdotq_f32((float32x4_t)c, (bfloat16x8_t)a, (bfloat16x8_t)b); }

}  // namespace
}  // namespace ipt_fast::cpu
