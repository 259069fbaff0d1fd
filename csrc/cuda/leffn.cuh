// The locally enhanced feed-forward network, with the norm before it and the residual around it, in one launch.
#pragma once

#include <stdint.h>

namespace ipt_fast::cuda {

// y = [x +] project(depthwise 5x5(GELU(expand([norm](x))))); images (batch, height, width, channels).
struct LeffnArguments {
    const void* x;
    const void *norm_weight, *norm_bias;  // no norm without norm_weight
    const void *expand, *depthwise, *project;
    void* y;
    int64_t batch;
    int height, width, hidden;
    float eps;
    bool narrow;  // the norm's parameters are of T, else float
    bool centered, residual, tf32;
};

constexpr int kLeffnHiddenStep = 32;

// `channels` is 32, 48, 64 or 96, `hidden` a multiple of kLeffnHiddenStep.
template <class T>
void leffn(const LeffnArguments& arguments, int channels, void* stream);

}  // namespace ipt_fast::cuda
