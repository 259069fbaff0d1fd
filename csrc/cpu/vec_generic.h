// Vectors for any processor, by what the compiler makes of four lanes.
#pragma once

#include "vec_types.h"

namespace ipt_fast::cpu {
namespace {

constexpr int kLanes = 4;
constexpr int kRegisters = 16;
constexpr bool kMatrixUnit = false;
constexpr bool kLooksUp = false;

using Vec = Lanes<float, kLanes>;
using Bits = Lanes<uint32_t, kLanes>;
using HalfBits = Lanes<uint16_t, kLanes>;

inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
inline Vec min(Vec a, Vec b) { return a < b ? a : b; }

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

inline HalfBits to_bf16(Vec v) { return round_to_bf16<kLanes>(v); }

}  // namespace
}  // namespace ipt_fast::cpu

#include "vec_no_dots.h"
