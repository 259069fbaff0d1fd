// Depthwise convolution of channels-last images, 3 x 3 and 5 x 5 with zero padding, and the gradient of its weight.
#pragma once

#include <stdint.h>

#include "common/marks.h"

namespace ipt_fast {

struct DepthwiseShape {
    int64_t batch;
    int height, width, channels;  // a multiple of kDepthwiseStep
};

// y = x * weight (channels, 1, size, size); `flip`: the taps in reversed order, as the gradient of x has them.
struct DepthwiseParams {
    const void *x, *weight;
    void* y;
    DepthwiseShape shape;
    bool flip;
};

// sums (shares, size * size, channels): of each share of the tiles.
struct DepthwiseGradientParams {
    const void *grad, *x;
    float* sums;
    DepthwiseShape shape;
    int shares;
};

// gradient (channels, taps): the sums of all shares.
struct DepthwiseSumParams {
    const float* sums;
    float* gradient;
    int shares, taps, channels;
};

constexpr int kDepthwiseThreads = 256, kDepthwiseStep = 8, kDepthwiseTile = 16;

// Tiles of 16 x 16 pixels.
IPT_FAST_BOTH inline int64_t depthwise_tiles(const DepthwiseShape& s) {
    return s.batch * ((s.height + kDepthwiseTile - 1) / kDepthwiseTile) *
           ((s.width + kDepthwiseTile - 1) / kDepthwiseTile);
}
// Blocks of channels, of 128 bytes.
template <class T>
IPT_FAST_BOTH inline int depthwise_parts(const DepthwiseShape& s) {
    constexpr int channels = 128 / sizeof(T);
    return (s.channels + channels - 1) / channels;
}
// How many shares the gradient's tiles are cut into. Sums depend on it, so that it depends on nothing but the shape.
template <class T>
int depthwise_shares(const DepthwiseShape& s) {
    const int most = 512 / depthwise_parts<T>(s) > 8 ? 512 / depthwise_parts<T>(s) : 8;
    return depthwise_tiles(s) < most ? (int)depthwise_tiles(s) : most;
}

// `size` is 3 or 5.
template <class T>
void depthwise(const DepthwiseParams& params, int size, void* stream);
template <class T>
void depthwise_gradient(const DepthwiseGradientParams& params, float* gradient, int size, void* stream);

}  // namespace ipt_fast
