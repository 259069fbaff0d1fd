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
template <typename Value>
inline void normalize_rows(const float* in, int64_t in_row, int64_t count, int64_t channels, const Norm& norm,
                           Value* out, int64_t out_row) {
    const float *weight = norm.weight, *bias = norm.bias;
    const bool centered = norm.centered;
    const int64_t end = padded(channels), whole = channels / kLanes * kLanes;
    const float scale = 1.0f / static_cast<float>(channels);
    for (int64_t first = 0; first < count; first += kLanes, in += kLanes * in_row, out += kLanes * out_row) {
        const int64_t pixels = count - first < kLanes ? count - first : kLanes;
        Vec sums[kLanes];
        for (int64_t i = pixels; i < kLanes; ++i) {
            sums[i] = Vec{};
        }
        for (int64_t i = 0; i < pixels; ++i) {
            Vec sum = load(in + i * in_row);
            for (int64_t c = kLanes; c < end; c += kLanes) {
                sum += load(in + i * in_row + c);
            }
            sums[i] = sum;
        }
        float mean[kLanes], rstd[kLanes];
        store(mean, sum_each(sums) * scale);
        for (int64_t i = 0; i < pixels; ++i) {
            Vec square{};
            for (int64_t c = 0; c < whole; c += kLanes) {
                const Vec difference = load(in + i * in_row + c) - mean[i];
                square = fma(difference, difference, square);
            }
            if (whole < channels) {
                Vec difference = load(in + i * in_row + whole) - mean[i];
                difference = lane_index() < static_cast<int32_t>(channels - whole) ? difference : Vec{};
                square = fma(difference, difference, square);
            }
            sums[i] = square;
        }
        store(rstd, 1.0f / sqrt(sum_each(sums) * scale + norm.eps));
        for (int64_t i = 0; i < pixels; ++i) {
            const Vec m = broadcast(centered ? mean[i] : 0.0f), r = broadcast(rstd[i]);
            for (int64_t c = 0; c < end; c += kLanes) {
                // weight and bias are padded with zeros, so the padding of a finite row stays zero
                const Vec y = fma((load(in + i * in_row + c) - m) * r, load(weight + c), load(bias + c));
                store(out + i * out_row + c, y);
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
