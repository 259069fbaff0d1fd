// The sum of two gated maps and its projection, framework-free.
#pragma once

#include "kernels.h"

namespace ipt_fast::cpu {

// Pixels are cut into blocks of this many.
constexpr int64_t kGatedBlock = 48;

struct GatedProjectionParams {
    DType dtype;  // of all maps
    Brgemm brgemm;
    Pixels x, other;
    const float* channel_gate;  // of x: padded channels
    int64_t gate_stride;        // as in Norm
    const void* pixel_gate;     // of `other`: a value of each pixel
    int64_t pixels, image_pixels, channels, columns;
    const void* packed;    // the weight, by `pack` of convolution_kernel.h
    const float* bias;     // padded columns
    const void* residual;  // a dense map like out; nullptr: there is none
    void* out;             // (pixels, columns)

    // Floats of scratch memory: the sum of a block, and its projection.
    IPT_FAST_INLINE int64_t scratch() const { return kGatedBlock * (padded(channels) + padded(columns)); }
};

struct GatedProjectionKernels {
    // Blocks begin <= k < end.
    void (*forward)(const GatedProjectionParams& p, int64_t begin, int64_t end, float* scratch);

    static const GatedProjectionKernels IPT_FAST_COMPILED_LEVELS;
};

}  // namespace ipt_fast::cpu
