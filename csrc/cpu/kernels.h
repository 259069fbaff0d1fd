// What the parameters of all CPU kernels are made of, framework-free: raw pointers and sizes.
#pragma once

#include <stdint.h>

#include "common/marks.h"

// The kernels are compiled once for each instruction set; every copy exports its table of functions under its own name.
#define IPT_FAST_DECLARE_KERNELS(Table, name) extern const Table name##_generic, name##_avx2, name##_avx512
#define IPT_FAST_JOIN(name, isa) name##_##isa
#define IPT_FAST_JOIN_EXPANDED(name, isa) IPT_FAST_JOIN(name, isa)
#define IPT_FAST_THIS_ISA(name) IPT_FAST_JOIN_EXPANDED(name, IPT_FAST_ISA)

namespace ipt_fast {

enum class DType { f32, bf16, f16 };

// Channels in scratch memory are padded to a multiple of this, with zeros.
constexpr int64_t kChannelPad = 16;

namespace {

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
inline int64_t padded(int64_t channels) { return round_up(channels, kChannelPad); }

}  // namespace

// A matrix of weights, (columns, depth) in the dtype of the images with any strides: the right operand, transposed.
struct Weight {
    const void* data;
    int64_t columns, depth, column_stride, depth_stride;
};

// A layer norm in front of a projection; weight == nullptr: there is none.
struct Norm {
    const float* weight;  // padded channels
    const float* bias;    // padded channels, zeros where there is none
    float eps;
    bool centered;
};

// c[rows][columns] (+)= a[rows][depth] b[depth][columns] on the matrix unit: a bf16, b in pairs of rows
// ([depth / 2][b_row][2]), c fp32. nullptr where there is no such unit.
using Brgemm = void (*)(int64_t rows, int64_t columns, int64_t depth, int64_t a_row, int64_t b_row, int64_t c_row,
                        bool accumulate, const uint16_t* a, const uint16_t* b, float* c);

}  // namespace ipt_fast
