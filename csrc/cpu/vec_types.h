// What the files of all levels are made of: types of vectors, and bf16 by integer arithmetic.
#pragma once

#include <stdint.h>

#include "kernels.h"

namespace ipt_fast::cpu {
namespace {

template <typename T, int lanes>
using Lanes [[gnu::vector_size(lanes * sizeof(T))]] = T;

struct BFloat16 {
    uint16_t bits;
};
struct Half {
    uint16_t bits;
};

// bf16 for products: subnormal numbers may have become zero.
struct Factor {
    uint16_t bits;
};

// To the nearest, ties to even; every NaN becomes the same one.
template <int lanes>
inline Lanes<uint16_t, lanes> round_to_bf16(Lanes<float, lanes> v) {
    using Bits = Lanes<uint32_t, lanes>;
    const Bits bits = (Bits)v;
    const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return __builtin_convertvector(v == v ? rounded : Bits{} + 0x7fc0, Lanes<uint16_t, lanes>);
}

}  // namespace
}  // namespace ipt_fast::cpu
