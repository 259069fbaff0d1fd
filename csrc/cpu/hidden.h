// What feed-forward networks do with hidden values, kLanes channels of a few pixels at a time.
#pragma once

#include "feed_forward_kernel.h"
#include "gelu.h"
#include "gemm.h"

namespace ipt_fast::cpu {
namespace {

// The layer norm of `count` pixels, at most kLanes, in place: pixel i's channels from c on are row i of values(c), and
// zeros beside their last one.
template <typename Values>
inline void normalize_pixels(const Values& values, int64_t channels, int64_t count, const Norm& norm) {
    const float scale = 1.0f / static_cast<float>(channels);
    Vec sums[kLanes]{}, squares[kLanes]{};
    for (int64_t c = 0; c < channels; c += kLanes) {
        const Rows<float> of_pixels = values(c);
        for (int64_t i = 0; i < count; ++i) {
            sums[i] += load(of_pixels.row(i));
        }
    }
    float mean[kLanes], rstd[kLanes];
    store(mean, sum_each(sums) * scale);
    for (int64_t c = 0; c < channels; c += kLanes) {
        const Rows<float> of_pixels = values(c);
        const auto inside = lane_index() < static_cast<int32_t>(channels - c);
        for (int64_t i = 0; i < count; ++i) {
            const Vec difference = inside ? load(of_pixels.row(i)) - mean[i] : Vec{};
            squares[i] = fma(difference, difference, squares[i]);
        }
    }
    store(rstd, 1.0f / sqrt(sum_each(squares) * scale + norm.eps));
    for (int64_t i = 0; i < count && !norm.centered; ++i) {
        mean[i] = 0;
    }
    for (int64_t c = 0; c < channels; c += kLanes) {
        const Rows<float> of_pixels = values(c);
        const Vec weight = load(norm.weight + c), bias = load(norm.bias + c);
        for (int64_t i = 0; i < count; ++i) {
            float* const value = of_pixels.row(i);
            store(value, fma((load(value) - mean[i]) * rstd[i], weight, bias));
        }
    }
}

// What a tail projects, of `count` pixels: row i of `out` from row i of the others. `convolved` are the convolution's
// sums, of Tail::activated_gate those of the first half, and then `gates` those of the second; `plain` is what the tail
// needs of the hidden values themselves.
template <typename Out>
inline void apply_tail(Tail tail, int64_t count, Rows<float> convolved, Vec bias, Rows<float> gates, Vec gate_bias,
                       Rows<const float> plain, Rows<Out> out) {
    const auto put = [&](const auto& value) __attribute__((always_inline)) {
        for (int64_t i = 0; i < count; ++i) {
            store(out.row(i), value(i));
        }
    };
    switch (tail) {
        case Tail::convolved:
            return put([&](int64_t i) { return load(convolved.row(i)) + bias; });
        case Tail::activated:
            return put([&](int64_t i) { return gelu(load(convolved.row(i)) + bias); });
        case Tail::added:
            return put([&](int64_t i) { return load(plain.row(i)) + gelu(load(convolved.row(i)) + bias); });
        case Tail::activated_gate:
            return put(
                [&](int64_t i) { return gelu(load(convolved.row(i)) + bias) * (load(gates.row(i)) + gate_bias); });
        case Tail::gate:
            return put([&](int64_t i) { return load(plain.row(i)) * (load(convolved.row(i)) + bias); });
    }
}

}  // namespace
}  // namespace ipt_fast::cpu
