// A product of two weight matrices, framework-free: raw pointers and sizes.
#pragma once

#include "kernels.h"

namespace ipt_fast {

// out[rows][columns] = left[rows][depth] right[depth][columns].
struct MergeParams {
    DType dtype;  // of out
    int64_t rows, columns, depth;
    const float* left;  // element (i, k) at i * left_row + k * left_depth; one of the two is 1, as below
    int64_t left_row, left_depth;
    const float* right;  // element (k, j) at k * right_row + j * right_column
    int64_t right_row, right_column;
    float* packed;       // padded(columns) * depth, written by `pack`
    void* out;           // contiguous
    int64_t block_rows;  // of one call of `multiply`
};

// Columns of the right matrix that are packed next to each other.
constexpr int64_t kMergeColumns = 64;

// Floats of one call's scratch.
inline int64_t merge_scratch(const MergeParams& params) {
    return params.block_rows * (params.depth + 2 * kMergeColumns);
}

struct MergeKernels {
    // Packs the columns first <= j < first + kMergeColumns, as far as there are.
    void (*pack)(const MergeParams& params, int64_t first);
    // Rows first <= i < first + block_rows, as far as there are.
    void (*multiply)(const MergeParams& params, int64_t first, float* scratch);
};

IPT_FAST_DECLARE_KERNELS(MergeKernels, merge);

}  // namespace ipt_fast
