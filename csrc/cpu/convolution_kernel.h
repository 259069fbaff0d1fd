// Pointwise and depthwise convolutions of channels-last maps and their gradients, framework-free.
#pragma once

#include "kernels.h"

namespace ipt_fast::cpu {

// Pixels are cut into blocks of this many, the gradient's sums into runs and the rows of its matrix into tiles.
constexpr int64_t kPointwiseBlock = 48;
constexpr int64_t kPointwiseRun = 192;
constexpr int64_t kPointwiseTile = 96;

struct PointwiseParams {
    DType dtype;  // of x, out and the weight
    Brgemm brgemm;
    const void* x;  // (pixels, channels)
    int64_t pixels, channels, columns;
    const void* packed;  // the weight, by `pack`
    void* out;           // (pixels, columns)
};

namespace {
inline int64_t pointwise_scratch(int64_t channels, int64_t columns) {
    return kPointwiseBlock * (padded(channels) + padded(columns));
}
}  // namespace

// sums[i][j] = the sum over pixels of grad[pixel][i] x[pixel][j] for a tile of rows i.
struct PointwiseWeightParams {
    DType dtype;
    Brgemm brgemm;
    const void* x;     // (pixels, channels)
    const void* grad;  // (pixels, columns)
    int64_t channels, columns;
};

namespace {
inline int64_t pointwise_weight_scratch(int64_t channels) {
    return 2 * kPointwiseRun * (padded(channels) + kPointwiseTile) + kPointwiseTile * padded(channels);
}
}  // namespace

// Work is cut into rows of strips: row k is row k % height of strip k / height % strips of image k / height / strips.
struct DepthwiseParams {
    DType dtype;
    int64_t kernel;  // 3 or 5
    const void* x;
    int64_t channels, height, width, strips;
    const float* weight;  // taps, padded channels; not for the weight's gradient
    const void* grad;     // only for the weight's gradient
    void* out;            // not for the weight's gradient

    IPT_FAST_INLINE int64_t widest() const { return (width + strips - 1) / strips; }
    IPT_FAST_INLINE int64_t scratch() const { return padded(channels) * (kernel * (widest() + kernel - 1) + widest()); }
};

struct ConvolutionKernels {
    int64_t (*packed_size)(DType dtype, Brgemm brgemm, int64_t columns, int64_t depth);
    void (*pack)(DType dtype, Brgemm brgemm, const Weight& weight, void* packed);
    // Blocks begin <= k < end of kPointwiseBlock pixels.
    void (*pointwise)(const PointwiseParams& p, int64_t begin, int64_t end, float* scratch);
    // Pixels begin <= k < end; rows of the tile from first_row on; sums is [columns][padded channels] in fp32.
    void (*pointwise_weight)(const PointwiseWeightParams& p, int64_t begin, int64_t end, int64_t first_row,
                             float* scratch, float* sums);
    // Rows begin <= k < end.
    void (*depthwise)(const DepthwiseParams& p, int64_t begin, int64_t end, float* scratch);
    // sums is [taps][padded channels].
    void (*depthwise_weight)(const DepthwiseParams& p, int64_t begin, int64_t end, float* scratch, double* sums);

    static const ConvolutionKernels IPT_FAST_COMPILED_LEVELS;
};

}  // namespace ipt_fast::cpu
