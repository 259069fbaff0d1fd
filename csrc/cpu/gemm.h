// Products of small matrices that lie in the first or second cache: the arithmetic core of the fused kernels. Operands
// are made of fp32 values, or of pairs in bf16 where the level multiplies these; sums are fp32.
//
// Vectors run along the columns. A register tile of kRows(n) rows by n vectors is kept over the whole inner dimension:
// two or more FMAs for every load, so the product is bound by arithmetic.
#pragma once

#include "kernels.h"
#include "matrix.h"
#include "vec.h"

namespace ipt_fast::cpu {
namespace {

// The widest tile, and the rows of each width: as many sums as leave registers for a row of b and a value of a.
constexpr int kPanelVectors = kRegisters >= 32 ? 4 : 2;
constexpr int panel_rows(int vectors) {
    if (kRegisters >= 32) {
        return vectors == 4 ? 6 : vectors == 3 ? 8 : vectors == 2 ? 10 : 16;
    }
    return vectors == 2 ? 6 : 8;
}

// How the columns of a packed matrix are cut: into the fewest panels of at most kPanelVectors vectors, evenly.
struct Panels {
    int64_t vectors, count;

    explicit Panels(int64_t columns)
        : vectors((columns + kLanes - 1) / kLanes), count((vectors + kPanelVectors - 1) / kPanelVectors) {}
    // A division of 64 bits would take as long as many products.
    int64_t first(int64_t panel) const { return static_cast<uint32_t>(panel * vectors) / static_cast<uint32_t>(count); }
    int64_t width(int64_t panel) const { return first(panel + 1) - first(panel); }
};

// A number as a type, so that a lambda gets it as a constant.
template <int n>
struct Constant {
    static constexpr int value = n;
};

// body(Constant<vectors>) for a panel of that many vectors, at most `most`.
template <int most = kPanelVectors, typename Body>
inline __attribute__((always_inline)) void with_width(int64_t vectors, const Body& body) {
    if constexpr (most > 1) {
        if (vectors < most) {
            return with_width<most - 1>(vectors, body);
        }
    }
    return body(Constant<most>{});
}

// Rows of a matrix without its extents.
template <typename T>
struct Rows {
    T* data;
    int64_t stride;

    T* row(int64_t i) const { return data + i * stride; }
};

// The left operand of a product as its rows, or as its columns where it is a transposed matrix: two types, so that the
// compiler knows which of the strides is 1.
template <typename E>
struct LeftRows {
    const E* data;
    int64_t stride;

    const E* at(int64_t i, int64_t k) const { return data + i * stride + k; }
    LeftRows from(int64_t i, int64_t k) const { return {at(i, k), stride}; }
};
template <typename E>
struct LeftColumns {
    const E* data;
    int64_t stride;

    const E* at(int64_t i, int64_t k) const { return data + i + k * stride; }
    LeftColumns from(int64_t i, int64_t k) const { return {at(i, k), stride}; }
};

// c (+)= a b for `rows` rows of a and c and `vectors` vectors of columns. What c holds is added to the finished sums: a
// few short sums round less than one long one.
template <int rows, int vectors, typename Left, typename E>
inline __attribute__((always_inline)) void tile(int64_t depth, Left a, Rows<const E> b, Rows<float> c,
                                                Accumulate accumulate) {
    Vec sums[rows][vectors];
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < vectors; ++j) {
            sums[i][j] = Vec{};
        }
    }
    for (int64_t k = 0; k < depth; ++k) {
        decltype(load(b.row(k))) right[vectors];
#pragma GCC unroll 4
        for (int j = 0; j < vectors; ++j) {
            right[j] = load(b.row(k) + j * kLanes);
        }
#pragma GCC unroll 16
        for (int i = 0; i < rows; ++i) {
            const auto left = broadcast(*a.at(i, k));
#pragma GCC unroll 4
            for (int j = 0; j < vectors; ++j) {
                sums[i][j] = add_product(left, right[j], sums[i][j]);
            }
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < vectors; ++j) {
            float* target = c.row(i) + j * kLanes;
            store(target, accumulate == Accumulate::yes ? load(target) + sums[i][j] : sums[i][j]);
        }
    }
}

// The same for any number of rows.
template <int vectors, typename Left, typename E>
void panel_product(int64_t rows, int64_t depth, Left a, Rows<const E> b, Rows<float> c, Accumulate accumulate) {
    constexpr int kRows = panel_rows(vectors);
    int64_t i = 0;
    for (; i + kRows <= rows; i += kRows) {
        tile<kRows, vectors>(depth, a.from(i, 0), b, {c.row(i), c.stride}, accumulate);
    }
    for (; i + 4 <= rows; i += 4) {
        tile<4, vectors>(depth, a.from(i, 0), b, {c.row(i), c.stride}, accumulate);
    }
    for (; i < rows; ++i) {
        tile<1, vectors>(depth, a.from(i, 0), b, {c.row(i), c.stride}, accumulate);
    }
}

// Depth of one pass: a panel of this depth stays in the first cache, and one sum has no more terms.
constexpr int64_t kDepthBlock = 128;

// c (+)= a b, where b(panels, panel) is a panel's columns of b. Whole vectors of columns are read and written.
template <typename Left, typename B>
inline void product_of(int64_t depth, Left a, const B& b, Matrix<float> c, Accumulate accumulate) {
    const Panels panels(c.columns);
    for (int64_t panel = 0; panel < panels.count; ++panel) {
        const auto right = b(panels, panel);
        const Rows<float> target{c.data + panels.first(panel) * kLanes, c.stride};
        with_width(panels.width(panel), [&](auto vectors) __attribute__((always_inline)) {
            int64_t k = 0;
            do {  // once for a depth of 0
                const int64_t block = depth - k < kDepthBlock ? depth - k : kDepthBlock;
                panel_product<decltype(vectors)::value>(c.rows, block, a.from(0, k),
                                                        decltype(right){right.row(k), right.stride}, target,
                                                        k > 0 ? Accumulate::yes : accumulate);
                k += block;
            } while (k < depth);
        });
    }
}

// The left operand `of`, transposed.
template <typename E>
struct Transposed {
    Matrix<const E> of;
};

inline Transposed<float> transposed(Matrix<const float> a) { return {a}; }

template <typename E>
inline auto panels_of(Matrix<const E> b) {
    return [=](const Panels& panels, int64_t panel) {
        return Rows<const E>{b.data + panels.first(panel) * kLanes, b.stride};
    };
}

// c (+)= a b. Columns are padded to whole vectors in b and c.
template <typename E>
inline void product_of_rows(Matrix<const E> a, Matrix<const E> b, Matrix<float> c, Accumulate accumulate) {
    product_of(a.columns, LeftRows<E>{a.data, a.stride}, panels_of(b), c, accumulate);
}
template <typename E>
inline void product_of_columns(Transposed<E> a, Matrix<const E> b, Matrix<float> c, Accumulate accumulate) {
    product_of(a.of.rows, LeftColumns<E>{a.of.data, a.of.stride}, panels_of(b), c, accumulate);
}
inline void product(Matrix<const float> a, Matrix<const float> b, Matrix<float> c, Accumulate accumulate) {
    product_of_rows(a, b, c, accumulate);
}
inline void product(Transposed<float> a, Matrix<const float> b, Matrix<float> c, Accumulate accumulate) {
    product_of_columns(a, b, c, accumulate);
}

}  // namespace
}  // namespace ipt_fast::cpu
