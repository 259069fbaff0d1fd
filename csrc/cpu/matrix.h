// Views of matrices, framework-free: a few numbers, passed by value, that own nothing.
#pragma once

#include <stdint.h>

#include "common/marks.h"

namespace ipt_fast::cpu {

// Element (i, j) is data[i * stride + j]. A view of const values is only read through.
template <typename T>
struct Matrix {
    T* data;
    int64_t rows, columns;
    int64_t stride;  // values between the beginnings of two rows

    IPT_FAST_INLINE T* row(int64_t i) const { return data + i * stride; }
    // `count` rows from row `first` on.
    IPT_FAST_INLINE Matrix slice(int64_t first, int64_t count) const { return {row(first), count, columns, stride}; }
    // All from element (i, j) on.
    IPT_FAST_INLINE Matrix from(int64_t i, int64_t j) const { return {row(i) + j, rows - i, columns - j, stride}; }

    IPT_FAST_INLINE operator Matrix<const T>() const { return {data, rows, columns, stride}; }
};

template <typename T>
Matrix(T*, int64_t, int64_t, int64_t) -> Matrix<T>;

// Whether a product is added to what its target holds, or overwrites it.
enum class Accumulate : bool { no, yes };

}  // namespace ipt_fast::cpu
