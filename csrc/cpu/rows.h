// Pixels of a channels-last map to and from rows of scratch memory, padded to kChannelPad channels with zeros.
#pragma once

#include "gemm.h"
#include "vec.h"

namespace ipt_fast::cpu {
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

// The layer norm of `count` <= kLanes rows; `size` is the number of channels, or 0 where it is not known beforehand.
template <int64_t size, typename T, typename Value>
inline __attribute__((always_inline)) void normalize_block(const T* in, int64_t in_row, int64_t count, int64_t channels,
                                                           const Norm& norm, Value* out, int64_t out_row) {
    const int64_t known = size > 0 ? size : channels, end = padded(known), whole = known / kLanes * kLanes;
    const float scale = 1.0f / static_cast<float>(known);
    Vec sums[kLanes];
    for (int64_t i = count; i < kLanes; ++i) {
        sums[i] = Vec{};
    }
    for (int64_t i = 0; i < count; ++i) {
        Vec sum = load(in + i * in_row);
#pragma GCC unroll 4
        for (int64_t c = kLanes; c < end; c += kLanes) {
            sum += load(in + i * in_row + c);
        }
        sums[i] = sum;
    }
    float mean[kLanes], rstd[kLanes];
    store(mean, sum_each(sums) * scale);
    for (int64_t i = 0; i < count; ++i) {
        Vec square{};
#pragma GCC unroll 4
        for (int64_t c = 0; c < whole; c += kLanes) {
            const Vec difference = load(in + i * in_row + c) - mean[i];
            square = fma(difference, difference, square);
        }
        if (whole < known) {
            Vec difference = load(in + i * in_row + whole) - mean[i];
            difference = lane_index() < static_cast<int32_t>(known - whole) ? difference : Vec{};
            square = fma(difference, difference, square);
        }
        sums[i] = square;
    }
    store(rstd, 1.0f / sqrt(sum_each(sums) * scale + norm.eps));
    for (int64_t i = 0; i < count; ++i) {
        const Vec m = broadcast(norm.centered ? mean[i] : 0.0f), r = broadcast(rstd[i]);
#pragma GCC unroll 4
        for (int64_t c = 0; c < end; c += kLanes) {
            // weight and bias are padded with zeros, so the padding of a finite row stays zero
            const Vec y = fma((load(in + i * in_row + c) - m) * r, load(norm.weight + c), load(norm.bias + c));
            store(out + i * out_row + c, y);
        }
    }
}

// The layer norm of rows that are padded with zeros, in place or into rows of another type.
template <typename T, typename Value>
inline void normalize_rows(const T* in, int64_t in_row, int64_t count, int64_t channels, const Norm& norm, Value* out,
                           int64_t out_row) {
    const auto run = [&](auto size) __attribute__((always_inline)) {
        int64_t i = 0;
        for (; i + kLanes <= count; i += kLanes) {
            normalize_block<decltype(size)::value>(in + i * in_row, in_row, kLanes, channels, norm, out + i * out_row,
                                                   out_row);
        }
        if (i < count) {
            normalize_block<0>(in + i * in_row, in_row, count - i, channels, norm, out + i * out_row, out_row);
        }
    };
    switch (channels) {
        case 32:
            return run(Constant<32>{});
        case 48:
            return run(Constant<48>{});
        case 64:
            return run(Constant<64>{});
        default:
            return run(Constant<0>{});
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
}  // namespace ipt_fast::cpu
