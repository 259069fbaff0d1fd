// Layer norm over the channels of a map, framework-free: raw pointers and sizes.
#pragma once

#include "kernels.h"

namespace ipt_fast::cpu {

// A (batch, channels, pixels) map, dense, with either the channels or the pixels next to each other in memory.
struct Map {
    const void* data;
    bool channels_last;
};

// Work is cut into blocks of this many pixels of one image; block k is image k / blocks, block k % blocks in it.
constexpr int64_t kBlockPixels = 64;

struct LayerNorm2dParams {
    DType dtype;  // of x, out, grad_out and grad_x
    Map x;
    int64_t channels;
    int64_t padded_channels;  // channels rounded up to kChannelPad
    int64_t pixels;           // of one image
    Norm norm;
    void* out;  // channels last; the backward writes grad_x here
    Map grad;   // backward only
};

namespace {

// Floats of scratch that one call needs.
inline int64_t forward_scratch(int64_t padded_channels) { return kBlockPixels * padded_channels; }
inline int64_t backward_scratch(int64_t padded_channels) { return 2 * kBlockPixels * padded_channels; }

}  // namespace

struct LayerNorm2dKernels {
    // Blocks begin <= k < end.
    void (*forward)(const LayerNorm2dParams& params, int64_t begin, int64_t end, float* scratch);
    // The same, adding the blocks' share of the gradients to grad_weight and grad_bias (padded_channels each). Where
    // either is of each image, the blocks are of one image.
    void (*backward)(const LayerNorm2dParams& params, int64_t begin, int64_t end, float* scratch, double* grad_weight,
                     double* grad_bias);

    static const LayerNorm2dKernels IPT_FAST_COMPILED_LEVELS;
};

}  // namespace ipt_fast::cpu
