// What the ways to compute a dense 3 x 3 convolution share: its weight by taps, and what follows its sums.
#pragma once

#include "dense_convolution_kernel.h"
#include "gelu.h"
#include "units.h"

namespace ipt_fast::cpu {
namespace {

constexpr int64_t kTaps = 9;

// put(column, channel, taps) for every channel and every vector of columns, from `column` on; taps are kTaps vectors.
template <typename T, typename Put>
void for_taps(const DenseConvolutionParams& p, const Put& put) {
    const Weight weight{p.weight, p.columns, p.channels * kTaps, p.channels * kTaps, 1};
    for (int64_t column = 0; column < padded(p.columns); column += kLanes) {
        for (int64_t first = 0; first < p.channels; first += kLanes) {
            Vec rows[kTaps][kLanes];  // of kLanes channels, one tap after the other
            for (int64_t i = 0; i < kTaps; ++i) {
                if (column < p.columns && first * kTaps + i * kLanes < weight.depth) {
                    load_weight<T>(weight, first * kTaps + i * kLanes, column, rows[i]);
                } else {
                    memset(rows[i], 0, sizeof(rows[i]));
                }
            }
            for (int64_t i = 0; i < kLanes && first + i < p.channels; ++i) {
                put(column, first + i, rows[0] + i * kTaps);
            }
        }
    }
}

// body(finish): finish(c, sum) is what becomes of the sums of a pixel's columns from c on.
template <typename Body>
inline void with_epilogue(const DenseConvolutionParams& p, const Body& body) {
    const auto bias = [&](int64_t c)
                          __attribute__((always_inline)) { return p.bias == nullptr ? Vec{} : load(p.bias + c); };
    if (p.gelu) {
        body([=](int64_t c, Vec sum) __attribute__((always_inline)) { return gelu_of_result(sum + bias(c)); });
    } else {
        body([=](int64_t c, Vec sum) __attribute__((always_inline)) { return sum + bias(c); });
    }
}

}  // namespace
}  // namespace ipt_fast::cpu
