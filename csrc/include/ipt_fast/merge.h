// A product of two weight matrices, framework-free: raw pointers and sizes.
#pragma once

#include "kernels.h"

namespace ipt_fast {

// out[rows][columns] = left[rows][depth] right[depth][columns].
struct MergeParams {
    DType dtype;  // of out
    int64_t rows, columns, depth;
    const float* left;  // element (i, k) at i * left_row + k * left_depth
    int64_t left_row, left_depth;
    const float* right;  // contiguous rows, right_row floats apart, padded with zeros
    int64_t right_row;
    void* out;  // contiguous
};

// Rows of one call: a multiple of the products' register tiles, few enough for the second cache.
constexpr int64_t kMergeRows = 48;

struct MergeKernels {
    // Rows first <= i < first + kMergeRows, as far as there are; scratch: kMergeRows * padded(columns) floats.
    void (*multiply)(const MergeParams& params, int64_t first, float* scratch);
};

IPT_FAST_DECLARE_KERNELS(MergeKernels, merge);

}  // namespace ipt_fast
