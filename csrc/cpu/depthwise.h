// One row of a depthwise convolution, one vector of channels at a time.
#pragma once

#include "gemm.h"
#include "vec.h"

namespace ipt_fast::cpu {
namespace {

// Pixels whose sums are kept in registers: so many that a sum's next addition comes after the last one has finished.
constexpr int kDepthwisePixels = 12;

// Values of a row are kept in registers where there are 32 of them, else read again for every tap.
constexpr int kDepthwiseUnroll = kRegisters >= 32 ? 5 : 1;

// The rows of input under a kernel, of kLanes channels: pixel x of row y is at rows[y] + x * stride. A row begins
// kernel / 2 pixels before the row of output and ends as many after it.
struct InputRows {
    const float* const* rows;
    int64_t stride;
};

// A kernel's weights of kLanes channels: tap (y, x) is at data + (y * kernel + x) * stride.
struct Taps {
    const float* data;
    int64_t stride;
};

template <int kernel, int pixels>
inline __attribute__((always_inline)) void depthwise_pixels(InputRows in, int64_t first, Taps taps, Vec* sums) {
#pragma GCC unroll 12
    for (int i = 0; i < pixels; ++i) {
        sums[i] = Vec{};
    }
#pragma GCC unroll 1
    for (int y = 0; y < kernel; ++y) {
        const float* row = in.rows[y] + first * in.stride;
        asm("" : "+r"(row));  // else gcc keeps the offsets of all pixels in registers it does not have
#pragma GCC unroll kDepthwiseUnroll
        for (int x = 0; x < kernel; ++x) {
            const Vec tap = load(taps.data + (y * kernel + x) * taps.stride);
#pragma GCC unroll 12
            for (int i = 0; i < pixels; ++i) {
                sums[i] = fma(load(row + (i + x) * in.stride), tap, sums[i]);
            }
        }
    }
}

// body(pixel, sum) for the `count` pixels of a row of output.
template <int kernel, typename Body>
inline void depthwise_row(InputRows in, int64_t count, Taps taps, const Body& body) {
    int64_t first = 0;
    const auto run = [&](auto pixels) __attribute__((always_inline)) {
        constexpr int kPixels = decltype(pixels)::value;
        for (; first + kPixels <= count; first += kPixels) {
            Vec sums[kPixels];
            depthwise_pixels<kernel, kPixels>(in, first, taps, sums);
#pragma GCC unroll 12
            for (int i = 0; i < kPixels; ++i) {
                body(first + i, sums[i]);
            }
        }
    };
    run(Constant<kDepthwisePixels>{});
    run(Constant<8>{});
    run(Constant<4>{});
    run(Constant<1>{});
}

// The same for a kernel of any size.
template <typename Body>
inline void depthwise_row_any(int64_t kernel, InputRows in, int64_t count, Taps taps, const Body& body) {
    for (int64_t i = 0; i < count; ++i) {
        Vec sum{};
        for (int64_t y = 0; y < kernel; ++y) {
            for (int64_t x = 0; x < kernel; ++x) {
                sum =
                    fma(load(in.rows[y] + (i + x) * in.stride), load(taps.data + (y * kernel + x) * taps.stride), sum);
            }
        }
        body(i, sum);
    }
}

// The same for a kernel whose size is `fixed`, or 0: any.
template <int fixed, typename Body>
inline void convolve_row(InputRows in, int64_t count, int64_t kernel, Taps taps, const Body& body) {
    if constexpr (fixed != 0) {
        depthwise_row<fixed>(in, count, taps, body);
    } else {
        depthwise_row_any(kernel, in, count, taps, body);
    }
}

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

// sums[tap] += the sum of grad[pixel] * input[pixel + tap] over a row of grad. input[y] begins kernel / 2 pixels
// before it. `fixed` is the kernel's size, or 0: any.
template <int fixed>
inline void add_tap_gradients(const float* grad, const float* const* input, int64_t count, int64_t kernel,
                              float* sums) {
    if constexpr (fixed != 0) {
        constexpr int kPixels = kRegisters >= 32 ? 8 : 4;
        for (int y = 0; y < fixed; ++y) {
            Vec parts[2][fixed]{};  // of even and of odd pixels: two chains of FMAs for each tap
            const float *g = grad, *in = input[y];
            int64_t left = count;
            for (; left >= kPixels; left -= kPixels, g += kPixels * kLanes, in += kPixels * kLanes) {
                add_tap_sums<fixed, kPixels, 2>(in, g, parts);
            }
            for (; left > 0; --left, g += kLanes, in += kLanes) {
                add_tap_sums<fixed, 1, 2>(in, g, parts);
            }
#pragma GCC unroll 5
            for (int x = 0; x < fixed; ++x) {
                float* target = sums + (y * fixed + x) * kLanes;
                store(target, load(target) + parts[0][x] + parts[1][x]);
            }
        }
    } else {
        for (int64_t tap = 0; tap < kernel * kernel; ++tap) {
            const float* in = input[tap / kernel] + tap % kernel * kLanes;
            Vec sum = load(sums + tap * kLanes);
            for (int64_t i = 0; i < count; ++i) {
                sum = fma(load(grad + i * kLanes), load(in + i * kLanes), sum);
            }
            store(sums + tap * kLanes, sum);
        }
    }
}

}  // namespace
}  // namespace ipt_fast::cpu
