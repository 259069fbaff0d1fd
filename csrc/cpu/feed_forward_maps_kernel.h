// What lies between the convolutions of a feed-forward network and of its backward, framework-free: maps of hidden
// channels, one value of each at a time.
#pragma once

#include "feed_forward_kernel.h"

namespace ipt_fast::cpu {

// Some channels of the pixels of a dense channels-last map; data == nullptr: there is none.
struct Channels {
    void* data;      // of the first pixel
    int64_t stride;  // values between two pixels
};

struct ActivationParams {
    DType dtype;  // of all maps
    int64_t channels;
    Channels hidden, out;
    Channels grad, other;  // only for the slope; `other` may be absent
};

// Of a tail: what it reads, and where it puts what is projected.
struct TailParams {
    DType dtype;  // of all maps
    Tail tail;
    int64_t channels;
    Channels first;      // what is not convolved (Tail::added, Tail::gate)
    Channels convolved;  // c, of the second half where there are two
    Channels upstream;   // the gradient of what is projected
    Channels projected;
};

struct FeedForwardMapsKernels {
    // Pixels begin <= k < end: out = GELU(hidden).
    void (*activate)(const ActivationParams& params, int64_t begin, int64_t end);
    // out = (grad + other) * GELU'(hidden); out may be one of the others.
    void (*slope)(const ActivationParams& params, int64_t begin, int64_t end);
    // Writes `projected`, and each c's gradient in its place. For Tail::gate the gradient of `first` takes the place of
    // `upstream`, for Tail::added it is `upstream`.
    void (*tail)(const TailParams& params, int64_t begin, int64_t end);

    static const FeedForwardMapsKernels IPT_FAST_COMPILED_LEVELS;
};

}  // namespace ipt_fast::cpu
