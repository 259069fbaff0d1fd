// Products of fp32 on a matrix unit that multiplies bf16, as accurate as those of fp32.
//
// A value of fp32 is the sum of three of bf16, its thirds: the eight highest of its 24 bits, the eight in the middle
// and the lowest eight. Cutting them off is exact. A product of two values is the sum of six products of their thirds,
// of the large ones and of those in the middle: the three that are left out are smaller than the rounding of fp32. Six
// products in bf16 take less time than one in fp32, if nobody else uses the unit.
//
// Thirds and their products of less than 2^-126, the smallest normal number, are taken for zero: below 2^-110 values,
// and products of values, lose their last bits. Where an operand is infinite, a product may be NaN where that of fp32
// is infinite.
//
// Operands are made of groups of 32 values along the inner dimension, of which the unit multiplies pairs: value j and
// value 16 + j of a group are a pair, so that no value changes its lane. A group is 3 * 16 pairs, one third after the
// other: neighbours in a row of the left operand, rows of the right one.
#pragma once

#include "kernels.h"
#include "vec.h"
#include "weights.h"

namespace ipt_fast::cpu {
namespace {

constexpr int kThirds = 3;
constexpr int64_t kGroupPairs = kGroupDepth / 2, kGroupRow = kThirds * kGroupPairs;
constexpr int64_t kThirdsRows = 32, kThirdsColumns = 32;  // of one call

inline int64_t groups_of(int64_t depth) { return (depth + kGroupDepth - 1) / kGroupDepth; }

// put(third, pairs) for the thirds of pairs of values.
template <typename Put>
inline __attribute__((always_inline)) void split(Vec low, Vec high, const Put& put) {
#pragma GCC unroll 3
    for (int third = 0; third < kThirds; ++third) {
        const Bits of_low = (Bits)low & 0xffff0000, of_high = (Bits)high & 0xffff0000;
        put(third, of_low >> 16 | of_high);
        low -= (Vec)of_low;
        high -= (Vec)of_high;
    }
}

// A row of a left operand.
template <typename T>
inline void split_row(const T* values, int64_t depth, Pair* out) {
    const auto load_from = [=](int64_t k) __attribute__((always_inline)) {
        return k + kLanes <= depth ? load(values + k) : k < depth ? load(values + k, depth - k) : Vec{};
    };
    for (int64_t k = 0; k < depth; k += kGroupDepth, out += kGroupRow) {
        split(load_from(k), load_from(k + kLanes),
              [&](int third, Bits pairs) { store(out + third * kGroupPairs, pairs); });
    }
}

// A group's kLanes columns of a right operand; row(k) is row k of the group.
template <typename Row>
inline void split_columns(const Row& row, Pair* out, int64_t stride) {
    for (int64_t j = 0; j < kGroupPairs; ++j) {
        split(row(j), row(kGroupPairs + j),
              [&](int third, Bits pairs) { store(out + (third * kGroupPairs + j) * stride, pairs); });
    }
}

// body(first, width) for blocks of kThirdsColumns columns, the last of which may have 16.
template <typename Body>
inline void for_column_blocks(int64_t columns, const Body& body) {
    for (int64_t first = 0; first < columns; first += kThirdsColumns) {
        body(first, columns - first < kThirdsColumns ? columns - first : kThirdsColumns);
    }
}

// A packed weight: blocks of columns, one after the other.
template <typename T>
void pack_thirds(const Weight& w, Pair* out) {
    const int64_t groups = groups_of(w.depth);
    for_column_blocks(padded(w.columns), [&](int64_t first, int64_t width) {
        for (int64_t group = 0; group < groups; ++group, out += kGroupRow * width) {
            for (int64_t column = 0; column < width; column += kLanes) {
                Vec rows[2][kLanes]{};
                for (int64_t half = 0; half < 2; ++half) {
                    const int64_t k = group * kGroupDepth + half * kLanes;
                    if (k < w.depth) {
                        load_weight<T>(w, k, first + column, rows[half]);
                    }
                }
                split_columns([&](int64_t k) { return rows[k / kLanes][k % kLanes]; }, out + column, width);
            }
        }
    });
}

// Pairs of a row that was split.
inline int64_t split_pairs(int64_t depth) { return groups_of(depth) * kGroupRow; }

// c (+)= a w for up to kThirdsRows rows that were split, some groups of them from `group` on, and a packed weight of
// `groups` groups.
inline void multiply_block(Brgemm product, Matrix<const Pair> a, int64_t group, int64_t groups, const Pair* packed,
                           Matrix<float> c, Accumulate accumulate) {
    for_column_blocks(padded(c.columns), [&](int64_t first, int64_t width) {
        const Pair* const b = packed + kGroupRow * (first * groups + group * width);
        product(a, {b, a.columns, width, width}, {c.data + first, c.rows, width, c.stride}, accumulate);
    });
}

// c = a w for a packed weight and rows that were split; whole tiles of them are read.
inline void multiply_split(Brgemm product, Matrix<const Pair> a, const Pair* packed, Matrix<float> c) {
    for (int64_t row = 0; row < c.rows; row += kThirdsRows) {
        const int64_t count = c.rows - row < kThirdsRows ? c.rows - row : kThirdsRows;
        multiply_block(product, a.slice(row, count), 0, a.columns / kGroupRow, packed, c.slice(row, count),
                       Accumulate::no);
    }
}

// c (+)= a w for a packed weight and rows of fp32.
inline void multiply_thirds(Brgemm product, Matrix<const float> a, const Pair* packed, Matrix<float> c,
                            Accumulate accumulate) {
    constexpr int64_t kGroups = 6;  // of a row that are split at a time
    alignas(64) Pair thirds[kThirdsRows * kGroups * kGroupRow];
    const int64_t groups = groups_of(a.columns);
    for (int64_t row = 0; row < c.rows; row += kThirdsRows) {
        const int64_t count = c.rows - row < kThirdsRows ? c.rows - row : kThirdsRows;
        for (int64_t group = 0; group < groups; group += kGroups) {
            const int64_t some = groups - group < kGroups ? groups - group : kGroups, k = group * kGroupDepth;
            const int64_t stride = some * kGroupRow, rest = a.columns - k;
            for (int64_t i = 0; i < count; ++i) {
                split_row(a.row(row + i) + k, rest < some * kGroupDepth ? rest : some * kGroupDepth,
                          thirds + i * stride);
            }
            multiply_block(product, {thirds, count, stride, stride}, group, groups, packed, c.slice(row, count),
                           group > 0 ? Accumulate::yes : accumulate);
        }
    }
}

// c = a b for a left operand that was split, and b of fp32; `room` is memory for packed_floats() of b.
inline void multiply_split_rows(Brgemm product, Matrix<const Pair> a, Matrix<const float> b, Pair* room,
                                Matrix<float> c) {
    const int64_t groups = groups_of(b.rows), columns = padded(b.columns);
    for_column_blocks(columns, [&](int64_t first, int64_t width) {
        for (int64_t group = 0; group < groups; ++group) {
            Pair* const out = room + kGroupRow * (first * groups + group * width);
            for (int64_t column = 0; column < width; column += kLanes) {
                const auto row = [&](int64_t k) {
                    const int64_t of_b = group * kGroupDepth + k;
                    return of_b < b.rows ? load(b.row(of_b) + first + column) : Vec{};
                };
                split_columns(row, out + column, width);
            }
        }
    });
    for (int64_t row = 0; row < c.rows; row += kThirdsRows) {
        const int64_t count = c.rows - row < kThirdsRows ? c.rows - row : kThirdsRows;
        for_column_blocks(columns, [&](int64_t first, int64_t width) {
            product(a.slice(row, count), {room + kGroupRow * first * groups, groups * kGroupRow, width, width},
                    {c.row(row) + first, count, width, c.stride}, Accumulate::no);
        });
    }
}

}  // namespace
}  // namespace ipt_fast::cpu
