// The backward of a feed-forward network without a convolution, framework-free: raw pointers and sizes.
#pragma once

#include "kernels.h"

namespace ipt_fast::cpu {

// Most pixels that go through the network together. Sums over so many are added up in fp32.
constexpr int64_t kMlpRun = 128;

// Of project(GELU(expand(norm(x)))) for dense channels-last maps. Each image is cut into `shares` shares of its pixels,
// each with its own sums of the weights' gradients, which are zeroed before.
struct MlpBackwardParams {
    DType dtype;  // of x, grad and grad_x
    Brgemm brgemm;
    const void* x;
    const void* grad;                                // of the output
    void* grad_x;                                    // of norm(x)
    int64_t pixels, channels, hidden, out_channels;  // pixels of one image
    Norm norm;
    const float* expand_bias;  // padded hidden, zeros where there is none
    // The right operands of the products with x, with grad (of an image or of all: the weight times the gate) and with
    // the gradient of the expanded map.
    const void *packed_expand, *packed_project, *packed_transposed;
    int64_t project_stride;  // bytes from an image's to the next image's; 0: all images have the same
    int64_t shares;
    float *grad_expand, *grad_project;    // [image][share][padded hidden][padded channels], [..][out][padded hidden]
    float *grad_expand_bias, *grad_sums;  // [image][share][padded hidden], and of grad [..][padded out]

    // Values between two pixels' hidden values: an odd number of cache lines, so that all sets of a cache are in use.
    IPT_FAST_INLINE int64_t pitch() const { return padded(hidden) / kChannelPad / 2 * 2 * kChannelPad + kChannelPad; }
};

struct MlpBackwardKernels {
    int64_t (*packed_size)(DType dtype, Brgemm brgemm, int64_t columns, int64_t depth);
    void (*pack)(DType dtype, Brgemm brgemm, const Weight& weight, void* packed);
    // Floats of scratch memory of one thread.
    int64_t (*scratch_size)(const MlpBackwardParams& params);
    // Share `share` of image `image`.
    void (*run)(const MlpBackwardParams& params, int64_t image, int64_t share, float* scratch);

    static const MlpBackwardKernels IPT_FAST_COMPILED_LEVELS;
};

}  // namespace ipt_fast::cpu
