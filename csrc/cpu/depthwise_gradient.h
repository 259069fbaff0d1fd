// The gradient of a depthwise convolution's weight over a few pixels of a row, one vector of channels.
#pragma once

#include "vec.h"

namespace ipt_fast::cpu {
namespace {

// sums[i % chains][x] += grad[i] row[i + x] for every pixel i and tap x: more chains of FMAs wait less for each other.
template <int kernel, int pixels, int chains>
inline __attribute__((always_inline)) void add_tap_sums(const float* row, const float* grad, Vec (*sums)[kernel]) {
    Vec g[pixels];
#pragma GCC unroll 8
    for (int i = 0; i < pixels; ++i) {
        g[i] = load(grad + i * kLanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < pixels + kernel - 1; ++i) {
        const Vec value = load(row + i * kLanes);
#pragma GCC unroll 5
        for (int x = 0; x < kernel; ++x) {
            if (i - x >= 0 && i - x < pixels) {
                sums[(i - x) % chains][x] = fma(value, g[i - x], sums[(i - x) % chains][x]);
            }
        }
    }
}

}  // namespace
}  // namespace ipt_fast::cpu
