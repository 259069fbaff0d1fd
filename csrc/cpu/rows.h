// Pixels of a channels-last map to and from rows of scratch memory, padded to kChannelPad channels with zeros.
#pragma once

#include "ipt_fast/kernels.h"
#include "vec.h"

namespace ipt_fast {
namespace {

// out[i] = in[i] for `count` pixels, `in_row` and `out_row` apart.
template <typename T, typename Value>
inline void load_rows(const T* in, int64_t in_row, int64_t count, int64_t channels, Value* out, int64_t out_row) {
    const int64_t end = padded(channels);
    for (int64_t i = 0; i < count; ++i) {
        const T* source = in + i * in_row;
        Value* row = out + i * out_row;
        int64_t c = 0;
        for (; c + kLanes <= channels; c += kLanes) {
            store(row + c, load(source + c));
        }
        for (; c < end; c += kLanes) {
            store(row + c, c < channels ? load(source + c, channels - c) : Vec{});
        }
    }
}

// The layer norm of rows, in place or into rows of another type; the padding of `in` must be zeros.
// Statistics as in layer_norm_2d: mean + rest is the mean to more than fp32's digits.
template <typename Value>
inline void normalize_rows(const float* in, int64_t in_row, int64_t count, int64_t channels, const Norm& norm,
                           Value* out, int64_t out_row) {
    const int64_t end = padded(channels);
    const float scale = 1.0f / static_cast<float>(channels);
    for (int64_t first = 0; first < count; first += kLanes) {
        const int64_t last = first + kLanes < count ? first + kLanes : count;
        Vec sums[kLanes]{}, squares[kLanes]{};
        for (int64_t i = first; i < last; ++i) {
            Vec sum{};
            for (int64_t c = 0; c < end; c += kLanes) {
                sum += load(in + i * in_row + c);
            }
            sums[i - first] = sum;
        }
        const Vec mean = sum_each(sums) * scale;
        for (int64_t i = first; i < last; ++i) {
            Vec sum{}, square{};
            int64_t c = 0;
            for (; c < end; c += kLanes) {
                Vec difference = load(in + i * in_row + c) - mean[i - first];
                if (c + kLanes > channels) {
                    difference = lane_index() < static_cast<int32_t>(channels - c) ? difference : Vec{};
                }
                sum += difference;
                square = fma(difference, difference, square);
            }
            sums[i - first] = sum;
            squares[i - first] = square;
        }
        const Vec rest = sum_each(sums) * scale;
        const Vec rstd = 1.0f / sqrt(sum_each(squares) * scale - rest * rest + norm.eps);
        for (int64_t i = first; i < last; ++i) {
            const float m = norm.centered ? mean[i - first] : 0.0f, r = norm.centered ? rest[i - first] : 0.0f;
            for (int64_t c = 0; c < end; c += kLanes) {
                const Vec x = (load(in + i * in_row + c) - m - r) * rstd[i - first];
                // weight and bias are padded with zeros, so the padding stays zero
                store(out + i * out_row + c, fma(x, load(norm.weight + c), load(norm.bias + c)));
            }
        }
    }
}

// out[i] = rows[i] + residual[i] (nullptr: none) for `count` pixels of a dense map.
template <typename T>
inline void store_rows(const float* rows, int64_t row, int64_t count, int64_t channels, const T* residual, T* out) {
    for (int64_t i = 0; i < count; ++i) {
        for_vectors(channels, [&](int64_t c, int64_t n) {
            const Vec value = load(rows + i * row + c, n);
            store(out + i * channels + c, residual ? value + load(residual + i * channels + c, n) : value, n);
        });
    }
}

}  // namespace
}  // namespace ipt_fast
