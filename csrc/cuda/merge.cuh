// Merging the branches of Rep-LeFFN: a product or a depthwise sum, and their gradients, each in one launch.
#pragma once

#include <stdint.h>

#include "common/marks.h"

namespace ipt_fast::cuda {

// y (rows, columns) = a (rows, inner) b (inner, columns): a and b with any strides, y contiguous.
struct Product {
    const void *a, *b;
    void* y;
    int rows, columns, inner;
    int64_t a_row, a_column, b_row, b_column;
};

// Forward: k5 + k3 + k1 (+ 1) of `channels` 5 x 5 kernels. Backward: their gradients from that of the sum.
struct DepthwiseSum {
    void *sum, *k5, *k3, *k1;
    int channels;
    bool identity, backward;
};

constexpr int kMergeProducts = 2;  // those of a backward
constexpr int kMergeRows = 64, kMergeColumns = 32, kMergeInner = 32, kMergeThreads = 128;
constexpr int kMergeValues = 1024;  // of a depthwise sum, for each block

// What is absent is all zeros and has no blocks.
struct MergeArguments {
    Product products[kMergeProducts];
    DepthwiseSum sum;
    bool tf32;
};

IPT_FAST_BOTH inline int64_t blocks_of(const Product& p) {
    return (int64_t)((p.rows + kMergeRows - 1) / kMergeRows) * ((p.columns + kMergeColumns - 1) / kMergeColumns);
}
IPT_FAST_BOTH inline int64_t blocks_of(const DepthwiseSum& s) {
    return ((int64_t)s.channels * 25 + kMergeValues - 1) / kMergeValues;
}

template <class T>
void merge(const MergeArguments& arguments, void* stream);
// Why this library's kernels cannot run on the current GPU; empty if they can.
const char* merge_error();

}  // namespace ipt_fast::cuda
