// What the parameters of all CPU kernels are made of, framework-free: raw pointers and sizes.
//
// An operator's kernels are a struct of functions, compiled once for each level. The struct declares a table of them
// for every level as members of itself, IPT_FAST_COMPILED_LEVELS, and the kernel's file defines that of its own level,
// IPT_FAST_LEVEL. kernels_in_use() of level.h gives the table of the level in use.
#pragma once

#include <stdint.h>

#include "common/marks.h"
#include "levels.h"
#include "matrix.h"

namespace ipt_fast::cpu {

enum class DType { f32, bf16, f16 };

// Channels in scratch memory are padded to a multiple of this, with zeros.
constexpr int64_t kChannelPad = 16;

namespace {

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
inline int64_t padded(int64_t channels) { return round_up(channels, kChannelPad); }

// Values along the inner dimension that fp32 on the matrix unit takes at a time (thirds.h).
constexpr int64_t kGroupDepth = 32;

}  // namespace

// A matrix of weights, (columns, depth) in the dtype of the images with any strides: the right operand, transposed.
struct Weight {
    const void* data;
    int64_t columns, depth, column_stride, depth_stride;
};

// What a layer begins with: a layer norm in front of a projection; weight == nullptr: there is none.
struct Norm {
    const float* weight;  // padded channels
    const float* bias;    // padded channels, zeros where there is none
    float eps;
    bool centered;
    int64_t weight_stride, bias_stride;  // from an image's values to the next image's; 0: all images have the same

    IPT_FAST_INLINE Norm of_image(int64_t image) const {
        return {weight + image * weight_stride, bias + image * bias_stride, eps, centered, 0, 0};
    }
};

// What a layer ends with: gate * (product + bias), before the residual is added; bias == nullptr: neither is there.
struct Epilogue {
    const float* bias;    // padded channels, zeros where there is none
    const float* gate;    // padded channels, ones where there is none
    int64_t gate_stride;  // as in Norm

    IPT_FAST_INLINE Epilogue of_image(int64_t image) const { return {bias, gate + image * gate_stride, 0}; }
};

// A dense map whose pixels are `stride` values apart.
struct Pixels {
    const void* data;
    int64_t stride;
};

// Two values in bf16, neighbours along the inner dimension of a product: the first in the low bits.
struct Pair {
    uint32_t bits;
};

// c (+)= a b on the matrix unit: a and b in pairs, of bf16 values or of thirds of fp32 values (thirds.h); c in fp32.
// nullptr where there is no such unit.
using Brgemm = void (*)(Matrix<const Pair> a, Matrix<const Pair> b, Matrix<float> c, Accumulate accumulate);

namespace {

// Floats that hold a packed matrix of weights, whichever unit multiplies by it. Where that is the matrix unit, a value
// of fp32 is three of 16 bits.
inline int64_t packed_floats(DType dtype, Brgemm brgemm, int64_t columns, int64_t depth) {
    const bool thirds = brgemm != nullptr && dtype != DType::bf16;
    return padded(columns) * (thirds ? round_up(depth, kGroupDepth) * 3 / 2 : padded(depth));
}

}  // namespace

}  // namespace ipt_fast::cpu
