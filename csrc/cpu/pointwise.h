// Pointwise convolutions of convolution_kernel.h: blocks of pixels times the packed weight.
#pragma once

#include "convolution_kernel.h"
#include "gelu.h"
#include "rows.h"
#include "units.h"

namespace ipt_fast::cpu {
namespace {

// out = pixels from `first` on times the gate of their images, as load_rows().
template <typename T, typename Value>
inline void gate_rows(const PointwiseParams& p, int64_t first, Matrix<T> pixels, Matrix<Value> out) {
    for (int64_t i = 0; i < pixels.rows; ++i) {
        const float* const gate = p.gate + (first + i) / p.image_pixels * p.gate_stride;
        for (int64_t c = 0; c < padded(p.channels); c += kLanes) {
            const int64_t n = p.channels - c < kLanes ? p.channels - c : kLanes;
            store(out.row(i) + c, n > 0 ? load(pixels.row(i) + c, n) * load(gate + c) : Vec{});
        }
    }
}

// out = the norm of pixels from `first` on, each by that of its image. `room` holds as many rows of fp32.
template <typename T, typename Value>
inline void normalize_rows_of_images(const PointwiseParams& p, int64_t first, Matrix<T> pixels, float* room,
                                     Matrix<Value> out) {
    for (int64_t i = 0, count; i < pixels.rows; i += count) {
        const int64_t image = (first + i) / p.image_pixels, rest = (image + 1) * p.image_pixels - (first + i);
        count = pixels.rows - i < rest ? pixels.rows - i : rest;
        const Matrix of_image = pixels.slice(i, count), target = out.slice(i, count);
        const Norm norm = p.norm.of_image(image);
        if (p.channels == padded(p.channels)) {
            normalize_rows(of_image, norm, target);
        } else {
            const Matrix staged{room, count, p.channels, padded(p.channels)};
            load_rows(of_image, staged);
            normalize_rows(staged, norm, target);
        }
    }
}

// A block of the map from its products: their bias, the GELU, the residual.
template <typename T>
inline void finish_rows(const PointwiseParams& p, Matrix<const float> products, const T* residual, T* out) {
    const auto run = [&](const auto& add_bias) {
        if (p.activated) {
            store_finished(products, residual, out, [&](Vec v, int64_t c) { return gelu_of_result(add_bias(v, c)); });
        } else {
            store_finished(products, residual, out, add_bias);
        }
    };
    if (p.bias == nullptr) {
        run([](Vec v, int64_t) { return v; });
    } else {
        run([&](Vec v, int64_t c) { return v + load(p.bias + c); });
    }
}

template <typename T, typename Unit>
inline void pointwise(const PointwiseParams& p, const Unit& unit, int64_t begin, int64_t end, float* scratch) {
    using Value = typename Unit::Value;
    constexpr bool in_place = sizeof(T) == sizeof(float);  // where the unit's values are those of the map
    float* const products = scratch;
    float* const room = products + p.block * padded(p.columns);
    Value* const staged = reinterpret_cast<Value*>(room + p.block * padded(p.channels));
    const T* const residual = static_cast<const T*>(p.residual);
    for (int64_t block = begin; block < end; ++block) {
        const int64_t first = block * p.block;
        const int64_t count = p.pixels - first < p.block ? p.pixels - first : p.block;
        const Matrix pixels{static_cast<const T*>(p.x.data) + first * p.x.stride, count, p.channels, p.x.stride};
        const Matrix left{staged, count, p.channels, padded(p.channels)};
        T* const out = static_cast<T*>(p.out) + first * p.columns;
        // nothing else to do to a float32 map of whole vectors: it is the target of the product
        const bool direct = in_place && p.columns % kLanes == 0 && !p.activated && residual == nullptr;
        Matrix target{products, count, p.columns, padded(p.columns)};
        if constexpr (in_place) {
            target = direct ? Matrix{out, count, p.columns, p.columns} : target;
        }
        const bool begun = direct && p.bias != nullptr;
        if (begun) {
            fill_rows(p.bias, target);
        }
        const auto multiply = [&](const auto& rows) {
            unit.multiply(rows, p.packed, target, begun ? Accumulate::yes : Accumulate::no);
        };
        if (p.norm.weight != nullptr) {
            normalize_rows_of_images(p, first, pixels, room, left);
            multiply(left);
        } else if (p.gate != nullptr) {
            gate_rows(p, first, pixels, left);
            multiply(left);
        } else if constexpr (in_place) {
            multiply(pixels);
        } else {
            load_rows(pixels, left);
            multiply(left);
        }
        if (!direct) {
            finish_rows(p, target, residual ? residual + first * p.columns : nullptr, out);
        }
    }
}

}  // namespace
}  // namespace ipt_fast::cpu
