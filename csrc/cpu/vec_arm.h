// What the levels with Arm's Advanced SIMD (NEON) have in common; every 64-bit Arm processor has it.
#pragma once

#include <arm_neon.h>

#include "vec_types.h"

namespace ipt_fast::cpu {
namespace {

constexpr int kLanes = 4;
constexpr int kRegisters = 32;
constexpr bool kMatrixUnit = false;
constexpr bool kLooksUp = false;

using Vec = Lanes<float, kLanes>;
using Bits = Lanes<uint32_t, kLanes>;
using HalfBits = Lanes<uint16_t, kLanes>;

inline Vec fma(Vec a, Vec b, Vec c) { return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }  // the instructions answer NaN where one of the two is NaN
inline Vec min(Vec a, Vec b) { return a < b ? a : b; }

inline Vec to_float(HalfBits h, Half) { return (Vec)vcvt_f32_f16((float16x4_t)h); }
inline HalfBits to_half(Vec v) { return (HalfBits)vcvt_f16_f32((float32x4_t)v); }
inline HalfBits to_bf16(Vec v) { return round_to_bf16<kLanes>(v); }

}  // namespace
}  // namespace ipt_fast::cpu
