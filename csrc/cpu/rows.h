// Pixels of a channels-last map to and from rows of scratch memory, padded to kChannelPad channels with zeros.
#pragma once

#include "gemm.h"
#include "matrix.h"
#include "vec.h"

namespace ipt_fast::cpu {
namespace {

// out = in; a row is a pixel, a column a channel.
template <typename T, typename Value>
inline void load_rows(Matrix<T> in, Matrix<Value> out) {
    const int64_t channels = in.columns, end = padded(channels);
    for (int64_t i = 0; i < in.rows; ++i) {
        const T* source = in.row(i);
        Value* row = out.row(i);
        int64_t c = 0;
        for (; c + kLanes <= channels; c += kLanes) {
            store(row + c, load(source + c));
        }
        for (; c < end; c += kLanes) {
            store(row + c, c < channels ? load(source + c, channels - c) : Vec{});
        }
    }
}

// Every row of whole vectors is the bias: what a product is added to.
inline void fill_rows(const float* bias, Matrix<float> rows) {
    for (int64_t i = 0; i < rows.rows; ++i) {
        for (int64_t c = 0; c < rows.columns; c += kLanes) {
            store(rows.row(i) + c, load(bias + c));
        }
    }
}

// The layer norm of at most kLanes rows; `size` is the number of channels, or 0 where it is not known beforehand.
template <int64_t size, typename T, typename Value>
inline __attribute__((always_inline)) void normalize_block(Matrix<T> in, const Norm& norm, Matrix<Value> out) {
    const int64_t count = in.rows, known = size > 0 ? size : in.columns, end = padded(known),
                  whole = known / kLanes * kLanes;
    const float scale = 1.0f / static_cast<float>(known);
    Vec sums[kLanes];
    for (int64_t i = count; i < kLanes; ++i) {
        sums[i] = Vec{};
    }
    for (int64_t i = 0; i < count; ++i) {
        Vec sum = load(in.row(i));
#pragma GCC unroll 4
        for (int64_t c = kLanes; c < end; c += kLanes) {
            sum += load(in.row(i) + c);
        }
        sums[i] = sum;
    }
    float mean[kLanes], rstd[kLanes];
    store(mean, sum_each(sums) * scale);
    for (int64_t i = 0; i < count; ++i) {
        Vec square{};
#pragma GCC unroll 4
        for (int64_t c = 0; c < whole; c += kLanes) {
            const Vec difference = load(in.row(i) + c) - mean[i];
            square = fma(difference, difference, square);
        }
        if (whole < known) {
            Vec difference = load(in.row(i) + whole) - mean[i];
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
            const Vec y = fma((load(in.row(i) + c) - m) * r, load(norm.weight + c), load(norm.bias + c));
            store(out.row(i) + c, y);
        }
    }
}

// The layer norm of rows that are padded with zeros, in place or into rows of another type.
template <typename T, typename Value>
inline void normalize_rows(Matrix<T> in, const Norm& norm, Matrix<Value> out) {
    const auto run = [&](auto size) __attribute__((always_inline)) {
        int64_t i = 0;
        for (; i + kLanes <= in.rows; i += kLanes) {
            normalize_block<decltype(size)::value>(in.slice(i, kLanes), norm, out.from(i, 0));
        }
        if (i < in.rows) {
            normalize_block<0>(in.from(i, 0), norm, out.from(i, 0));
        }
    };
    switch (in.columns) {
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

// body(add) for channels from c on: add(v) is v and their bias (nullptr: there is none, and nothing is added).
template <typename Body>
inline __attribute__((always_inline)) void with_bias(const float* bias, int64_t c, const Body& body) {
    if (bias == nullptr) {
        body([](Vec v) __attribute__((always_inline)) { return v; });
    } else {
        const Vec of_channels = load(bias + c);
        body([=](Vec v) __attribute__((always_inline)) { return v + of_channels; });
    }
}

// out = finish(rows, c) + residual (nullptr: none) for vectors of channels from c on, pixels of dense maps.
template <typename T, typename Finish>
inline __attribute__((always_inline)) void store_finished(Matrix<const float> rows, const T* residual, T* out,
                                                          const Finish& finish) {
    const int64_t channels = rows.columns;
    for (int64_t i = 0; i < rows.rows; ++i) {
        for_vectors(channels, [&](int64_t c, int64_t n) {
            const Vec value = finish(load(rows.row(i) + c, n), c);
            store(out + i * channels + c, residual ? value + load(residual + i * channels + c, n) : value, n);
        });
    }
}

// out = epilogue(rows) + residual (nullptr: none), pixels of dense maps of one image.
template <typename T>
inline void store_rows(Matrix<const float> rows, const T* residual, T* out, const Epilogue& epilogue = {}) {
    if (epilogue.bias == nullptr) {
        store_finished(rows, residual, out, [](Vec v, int64_t) __attribute__((always_inline)) { return v; });
    } else {
        store_finished(rows, residual, out, [&](Vec v, int64_t c) __attribute__((always_inline)) {
            return load(epilogue.gate + c) * (v + load(epilogue.bias + c));
        });
    }
}

// total += sums, whole vectors.
inline void add_to(Matrix<float> total, Matrix<const float> sums) {
    for (int64_t i = 0; i < sums.rows; ++i) {
        for (int64_t j = 0; j < sums.columns; j += kLanes) {
            float* target = total.row(i) + j;
            store(target, load(target) + load(sums.row(i) + j));
        }
    }
}

// The sum of a vector of each row, in four chains of additions.
inline Vec sum_rows(Rows<const float> rows, int64_t count) {
    Vec parts[4]{};
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) {
#pragma GCC unroll 4
        for (int64_t k = 0; k < 4; ++k) {
            parts[k] += load(rows.row(i + k));
        }
    }
    for (; i < count; ++i) {
        parts[0] += load(rows.row(i));
    }
    return (parts[0] + parts[1]) + (parts[2] + parts[3]);
}

}  // namespace
}  // namespace ipt_fast::cpu
