// Weights as vectors.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace ipt_fast::cpu {
namespace {

// rows[i] = row k + i of a weight matrix, kLanes columns from `column` on, as fp32; 0 outside.
template <typename T>
inline void load_weight(const Weight& w, int64_t k, int64_t column, Vec (&rows)[kLanes]) {
    const T* data = static_cast<const T*>(w.data) + column * w.column_stride + k * w.depth_stride;
    const int64_t depth = w.depth - k < kLanes ? w.depth - k : kLanes;
    const int64_t columns = w.columns - column < kLanes ? w.columns - column : kLanes;
    if (w.column_stride == 1 && depth == kLanes && columns == kLanes) {
        for (int64_t i = 0; i < kLanes; ++i) {
            rows[i] = load(data + i * w.depth_stride);
        }
        return;
    }
    if (w.depth_stride == 1) {
        for (int64_t j = 0; j < kLanes; ++j) {
            const T* source = data + j * w.column_stride;
            rows[j] = j >= columns ? Vec{} : depth == kLanes ? load(source) : load(source, depth);
        }
        transpose(rows);
        return;
    }
    for (int64_t i = 0; i < kLanes; ++i) {
        rows[i] = Vec{};
        for (int64_t j = 0; i < depth && j < columns; ++j) {
            rows[i][j] = load(data + j * w.column_stride + i * w.depth_stride, 1)[0];
        }
    }
}

}  // namespace
}  // namespace ipt_fast::cpu
