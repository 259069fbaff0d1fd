// One row of a depthwise convolution, one vector of channels at a time. Pixels of a row are `stride` floats apart; a
// row of input begins kernel / 2 pixels before the row of output and ends as many after it.
#pragma once

#include "vec.h"

namespace ipt_fast {
namespace {

#if defined(__AVX512F__)
constexpr int kDepthwisePixels = 12;
#else
constexpr int kDepthwisePixels = 6;
#endif

template <int kernel, int pixels>
inline __attribute__((always_inline)) void depthwise_pixels(const float* const* rows, int64_t first, int64_t stride,
                                                            const float* weight, int64_t weight_stride, Vec* sums) {
#pragma GCC unroll 12
    for (int i = 0; i < pixels; ++i) {
        sums[i] = Vec{};
    }
#pragma GCC unroll 1
    for (int y = 0; y < kernel; ++y) {
        const float* row = rows[y] + first * stride;
        Vec taps[kernel];
#pragma GCC unroll 5
        for (int x = 0; x < kernel; ++x) {
            taps[x] = load(weight + (y * kernel + x) * weight_stride);
        }
#pragma GCC unroll 16
        for (int i = 0; i < pixels + kernel - 1; ++i) {
            const Vec value = load(row + i * stride);
#pragma GCC unroll 5
            for (int x = 0; x < kernel; ++x) {
                if (i - x >= 0 && i - x < pixels) {
                    sums[i - x] = fma(value, taps[x], sums[i - x]);
                }
            }
        }
    }
}

// body(pixel, sum) for every pixel of a row of output, kLanes channels; tap (y, x) of the kernel is at
// weight + (y * kernel + x) * weight_stride.
template <int kernel, typename Body>
inline void depthwise_row(const float* const* rows, int64_t stride, int64_t count, const float* weight,
                          int64_t weight_stride, const Body& body) {
    int64_t first = 0;
    for (; first + kDepthwisePixels <= count; first += kDepthwisePixels) {
        Vec sums[kDepthwisePixels];
        depthwise_pixels<kernel, kDepthwisePixels>(rows, first, stride, weight, weight_stride, sums);
#pragma GCC unroll 12
        for (int i = 0; i < kDepthwisePixels; ++i) {
            body(first + i, sums[i]);
        }
    }
    for (; first < count; ++first) {
        Vec sums[1];
        depthwise_pixels<kernel, 1>(rows, first, stride, weight, weight_stride, sums);
        body(first, sums[0]);
    }
}

}  // namespace
}  // namespace ipt_fast
