// Pairs of bf16 at levels that have no instruction for them, which multiply none: what their code is made of.
#pragma once

#include "vec_types.h"

namespace ipt_fast::cpu {
namespace {

constexpr bool kDots = false;

inline HalfBits to_factor(Vec v) { return to_bf16(v); }

// As round_to_bf16, in the upper halves.
inline Bits round_upper(Vec v) {
    const Bits bits = (Bits)v, rounded = bits + 0x7fff + ((bits >> 16) & 1);
    return v == v ? rounded : Bits{} + 0x7fc00000;
}

inline Bits to_pairs(Vec low, Vec high) { return (round_upper(low) >> 16) | (round_upper(high) & 0xffff0000); }

inline Vec dot(Bits a, Bits b, Vec c) {
    return fma((Vec)(a << 16), (Vec)(b << 16), fma((Vec)(a & 0xffff0000), (Vec)(b & 0xffff0000), c));
}

}  // namespace
}  // namespace ipt_fast::cpu
