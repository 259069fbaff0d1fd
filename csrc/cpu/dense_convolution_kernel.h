// Dense 3 x 3 convolutions of channels-last maps that keep their size, framework-free.
#pragma once

#include "kernels.h"

namespace ipt_fast::cpu {

struct DenseConvolutionParams {
    DType dtype;  // of x, weight and out
    Brgemm brgemm;
    const void* x;  // (images, height, width, channels)
    int64_t images, height, width, channels, columns;
    const void* weight;  // (columns, channels, 3, 3), dense
    void* packed;        // the weight, by `pack`
    const float* bias;   // padded columns; nullptr: there is none
    bool gelu;           // of the sum and its bias
    void* out;           // (images, height, width, columns)
    int64_t threads;     // that share the tasks
};

struct DenseConvolutionKernels {
    // Whether they are of use: not where a unit multiplies this dtype directly, in which PyTorch convolves well.
    bool (*takes)(const DenseConvolutionParams& p);
    // Bytes of the packed weight, and floats that packing needs meanwhile.
    int64_t (*packed_size)(const DenseConvolutionParams& p);
    int64_t (*packing_scratch)(const DenseConvolutionParams& p);
    void (*pack)(const DenseConvolutionParams& p, float* scratch);
    int64_t (*tasks)(const DenseConvolutionParams& p);
    // Floats of each thread.
    int64_t (*scratch)(const DenseConvolutionParams& p);
    // Tasks begin <= k < end.
    void (*forward)(const DenseConvolutionParams& p, int64_t begin, int64_t end, float* scratch);

    static const DenseConvolutionKernels IPT_FAST_COMPILED_LEVELS;
};

}  // namespace ipt_fast::cpu
