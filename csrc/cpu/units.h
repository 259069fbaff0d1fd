// The units that multiply matrices: which one does depends on the level and on the dtype.
//
// VectorUnit multiplies fp32, DotUnit pairs of bf16 on the vector unit, MatrixUnit bf16 on the processor's matrix unit.
// Where there is one, VectorUnit leaves products with weights to it, too (thirds.h).
// All sum in fp32 and have the same functions:
//   Value                             what rows of left operands are made of
//   packed_size, pack<T>, multiply    a product with a weight matrix, packed beforehand
//   rows(a, room)                     rows of fp32 as rows of Value
//   left, left_transposed, right      operands of a product: from rows of Value, and from rows of fp32
//   product(a, b, c, accumulate)      of such operands
// `room` is memory for room_of() floats. VectorUnit does not touch it: its operands are the rows themselves.
// 16-bit operands are rounded to the nearest. Rows of Value are padded to kChannelPad with zeros.
#pragma once

#include "gemm.h"
#include "thirds.h"
#include "weights.h"

namespace ipt_fast::cpu {
namespace {

// Floats of `room` for an operand made of a matrix of this size.
inline int64_t room_of(int64_t rows, int64_t columns) { return padded(rows) * padded(columns); }

// The weight's columns from `column` on as pairs of rows k and k + 1, and so on: `put(i, pairs)` for row k + 2 * i.
template <typename T, typename Put>
inline void load_weight_pairs(const Weight& w, int64_t k, int64_t column, const Put& put) {
    Vec rows[kLanes];
    load_weight<T>(w, k, column, rows);
    for (int64_t i = 0; i < kLanes; i += 2) {
        put(i / 2, to_pairs(rows[i], rows[i + 1]));
    }
}

// Rows of fp32 as rows of 16 bits.
inline Matrix<const Factor> round_rows(Matrix<const float> a, void* room) {
    const int64_t row = padded(a.columns);
    Factor* const out = static_cast<Factor*>(room);
    for (int64_t i = 0; i < a.rows; ++i) {
        Factor* const target = out + i * row;
        for_vectors(a.columns, [&](int64_t c, int64_t n) { store(target + c, load(a.row(i) + c, n)); });
    }
    return {out, a.rows, a.columns, row};
}

inline Matrix<const Pair> as_pairs(Matrix<const Factor> a) {
    return {reinterpret_cast<const Pair*>(a.data), a.rows, (a.columns + 1) / 2, a.stride / 2};
}

// Rows of fp32 in pairs, one row of pairs for two rows.
inline Matrix<const Pair> pair_rows(Matrix<const float> b, void* room) {
    const int64_t row = padded(b.columns), pairs = (b.rows + 1) / 2;
    Pair* const out = static_cast<Pair*>(room);
    for (int64_t i = 0; i < pairs; ++i) {
        const float *const low = b.row(2 * i), *const high = b.row(2 * i + 1);
        const bool both = 2 * i + 1 < b.rows;
        for (int64_t c = 0; c < row; c += kLanes) {
            store(out + i * row + c, to_pairs(load(low + c), both ? load(high + c) : Vec{}));
        }
    }
    return {out, pairs, b.columns, row};
}

struct VectorUnit {
    using Value = float;

    Brgemm brgemm = nullptr;  // of thirds

    // Whether the matrix unit multiplies by such a weight. Where tiles would be half empty it is no faster.
    bool splits(int64_t columns, int64_t depth) const {
        return kMatrixUnit && brgemm != nullptr && columns >= kThirdsColumns && depth >= kGroupDepth;
    }

    // Bytes of a packed weight.
    int64_t packed_size(int64_t columns, int64_t depth) const {
        if (splits(columns, depth)) {
            return packed_floats(DType::f32, brgemm, columns, depth) * static_cast<int64_t>(sizeof(float));
        }
        return padded(columns) * depth * static_cast<int64_t>(sizeof(float));
    }

    // Panels one after the other, each [depth][columns of the panel].
    template <typename T>
    void pack(const Weight& w, void* packed) const {
        if (splits(w.columns, w.depth)) {
            return pack_thirds<T>(w, static_cast<Pair*>(packed));
        }
        float* out = static_cast<float*>(packed);
        const Panels panels(w.columns);
        for (int64_t panel = 0; panel < panels.count; ++panel) {
            const int64_t width = panels.width(panel) * kLanes;
            for (int64_t column = 0; column < width; column += kLanes) {
                for (int64_t k = 0; k < w.depth; k += kLanes) {
                    Vec rows[kLanes];
                    load_weight<T>(w, k, panels.first(panel) * kLanes + column, rows);
                    for (int64_t i = 0; i < kLanes && k + i < w.depth; ++i) {
                        store(out + (k + i) * width + column, rows[i]);
                    }
                }
            }
            out += w.depth * width;
        }
    }

    // c (+)= a w; columns are padded to kChannelPad in c.
    void multiply(Matrix<const float> a, const void* packed, Matrix<float> c, Accumulate accumulate) const {
        if (splits(c.columns, a.columns)) {
            return multiply_thirds(brgemm, a, static_cast<const Pair*>(packed), c, accumulate);
        }
        const float* b = static_cast<const float*>(packed);
        const int64_t depth = a.columns;
        const auto panel_of_b = [&](const Panels& panels, int64_t panel) {
            return Rows<const float>{b + panels.first(panel) * kLanes * depth, panels.width(panel) * kLanes};
        };
        product_of(depth, LeftRows<float>{a.data, a.stride}, panel_of_b, c, accumulate);
    }

    static Matrix<const float> rows(Matrix<const float> a, void*) { return a; }
    static Matrix<const float> left(Matrix<const float> a) { return a; }
    static Transposed<float> left_transposed(Matrix<const float> a, void*) { return {a}; }
    static Matrix<const float> right(Matrix<const float> b, void*) { return b; }
    static void product(Matrix<const float> a, Matrix<const float> b, Matrix<float> c, Accumulate accumulate) {
        product_of_rows(a, b, c, accumulate);
    }
    static void product(Transposed<float> a, Matrix<const float> b, Matrix<float> c, Accumulate accumulate) {
        product_of_columns(a, b, c, accumulate);
    }
};

// Pairs of bf16 on the vector unit: twice the products of fp32 in an instruction.
struct DotUnit {
    using Value = Factor;

    static int64_t packed_size(int64_t columns, int64_t depth) {
        return padded(columns) * (depth + 1) / 2 * static_cast<int64_t>(sizeof(Pair));
    }

    // Panels one after the other, each [depth / 2][columns of the panel].
    template <typename T>
    void pack(const Weight& w, void* packed) const {
        Pair* out = static_cast<Pair*>(packed);
        const Panels panels(w.columns);
        const int64_t pairs = (w.depth + 1) / 2;
        for (int64_t panel = 0; panel < panels.count; ++panel) {
            const int64_t width = panels.width(panel) * kLanes;
            for (int64_t column = 0; column < width; column += kLanes) {
                for (int64_t k = 0; k < w.depth; k += kLanes) {
                    load_weight_pairs<T>(w, k, panels.first(panel) * kLanes + column, [&](int64_t i, Bits row) {
                        if (k / 2 + i < pairs) {
                            store(out + (k / 2 + i) * width + column, row);
                        }
                    });
                }
            }
            out += pairs * width;
        }
    }

    void multiply(Matrix<const Factor> a, const void* packed, Matrix<float> c, Accumulate accumulate) const {
        const Pair* b = static_cast<const Pair*>(packed);
        const int64_t pairs = (a.columns + 1) / 2;
        const auto panel_of_b = [&](const Panels& panels, int64_t panel) {
            return Rows<const Pair>{b + panels.first(panel) * kLanes * pairs, panels.width(panel) * kLanes};
        };
        const LeftRows<Pair> left{reinterpret_cast<const Pair*>(a.data), a.stride / 2};
        product_of(pairs, left, panel_of_b, c, accumulate);
    }

    static Matrix<const Factor> rows(Matrix<const float> a, void* room) { return round_rows(a, room); }
    static Matrix<const Pair> left(Matrix<const Factor> a) { return as_pairs(a); }
    static Transposed<Pair> left_transposed(Matrix<const float> a, void* room) { return {pair_rows(a, room)}; }
    static Matrix<const Pair> right(Matrix<const float> b, void* room) { return pair_rows(b, room); }
    static void product(Matrix<const Pair> a, Matrix<const Pair> b, Matrix<float> c, Accumulate accumulate) {
        product_of_rows(a, b, c, accumulate);
    }
    static void product(Transposed<Pair> a, Matrix<const Pair> b, Matrix<float> c, Accumulate accumulate) {
        product_of_columns(a, b, c, accumulate);
    }
};

// bf16 on the matrix unit (AMX). The inner dimension is padded to kChannelPad with zeros.
struct MatrixUnit {
    using Value = Factor;
    static constexpr int64_t kBlock = 32;  // columns of one call

    Brgemm brgemm;

    static int64_t packed_size(int64_t columns, int64_t depth) {
        return padded(columns) * padded(depth) * static_cast<int64_t>(sizeof(Factor));
    }

    // Blocks of kBlock columns (the last may have 16), each [depth / 2][columns].
    template <typename T>
    void pack(const Weight& w, void* packed) const {
        Pair* out = static_cast<Pair*>(packed);
        const int64_t columns = padded(w.columns), depth = padded(w.depth);
        for (int64_t first = 0; first < columns; first += kBlock) {
            const int64_t width = columns - first < kBlock ? columns - first : kBlock;
            for (int64_t column = 0; column < width; column += kLanes) {
                for (int64_t k = 0; k < depth; k += kLanes) {
                    load_weight_pairs<T>(w, k, first + column,
                                         [&](int64_t i, Bits row) { store(out + (k / 2 + i) * width + column, row); });
                }
            }
            out += depth / 2 * width;
        }
    }

    void multiply(Matrix<const Factor> a, const void* packed, Matrix<float> c, Accumulate accumulate) const {
        const int64_t columns = padded(c.columns), pairs = padded(a.columns) / 2;
        const Matrix left{reinterpret_cast<const Pair*>(a.data), a.rows, pairs, a.stride / 2};
        const Pair* b = static_cast<const Pair*>(packed);
        for (int64_t first = 0; first < columns; first += kBlock) {
            const int64_t width = columns - first < kBlock ? columns - first : kBlock;
            brgemm(left, {b + first * pairs, pairs, width, width}, {c.data + first, c.rows, width, c.stride},
                   accumulate);
        }
    }

    static Matrix<const Factor> rows(Matrix<const float> a, void* room) { return round_rows(a, room); }
    static Matrix<const Pair> left(Matrix<const Factor> a) {
        return as_pairs({a.data, a.rows, padded(a.columns), a.stride});
    }
    static Matrix<const Pair> right(Matrix<const float> b, void* room) {
        const Matrix<const Pair> pairs = pair_rows(b, room);
        const int64_t all = padded(b.rows) / 2;
        Pair* const out = static_cast<Pair*>(room);
        memset(out + pairs.rows * pairs.stride, 0, (all - pairs.rows) * pairs.stride * sizeof(Pair));
        return {out, all, b.columns, pairs.stride};
    }
    // Pairs of rows, transposed.
    static Matrix<const Pair> left_transposed(Matrix<const float> a, void* room) {
        const int64_t pairs = (a.rows + 1) / 2, row = padded(pairs);
        Pair* const out = static_cast<Pair*>(room);
        for (int64_t k = 0; k < pairs; k += kLanes) {
            for (int64_t c = 0; c < a.columns; c += kLanes) {
                Vec tile[kLanes];
                for (int64_t i = 0; i < kLanes; ++i) {
                    const int64_t low = 2 * (k + i), high = low + 1;
                    tile[i] = (Vec)to_pairs(low < a.rows ? load(a.row(low) + c) : Vec{},
                                            high < a.rows ? load(a.row(high) + c) : Vec{});
                }
                transpose(tile);
                for (int64_t i = 0; i < kLanes; ++i) {
                    store(out + (c + i) * row + k, (Bits)tile[i]);
                }
            }
        }
        return {out, a.columns, padded(a.rows) / 2, row};
    }
    void product(Matrix<const Pair> a, Matrix<const Pair> b, Matrix<float> c, Accumulate accumulate) const {
        const int64_t columns = padded(c.columns);
        for (int64_t first = 0; first < columns; first += kBlock) {
            const int64_t width = columns - first < kBlock ? columns - first : kBlock;
            brgemm(a, {b.data + first, b.rows, width, b.stride}, {c.data + first, c.rows, width, c.stride}, accumulate);
        }
    }
};

// Whole vectors of values as the factors that a unit's products are made of.
template <typename Unit>
inline void round_values(const Unit&, float* values, int64_t count) {
    if constexpr (sizeof(typename Unit::Value) < sizeof(float)) {
        for (int64_t i = 0; i < count; i += kLanes) {
            store(values + i, to_float(to_factor(load(values + i)), BFloat16{}));
        }
    }
}

// body(T{}, unit) for the dtype of the maps and the unit of their products: of fp32 and fp16, which are computed in
// fp32, and of bf16 where nothing multiplies pairs, vectors.
template <typename Body>
inline auto with_types(DType dtype, Brgemm brgemm, const Body& body) {
    if constexpr (kMatrixUnit) {
        if (dtype == DType::bf16 && brgemm != nullptr) {
            return body(BFloat16{}, MatrixUnit{brgemm});
        }
    }
    if constexpr (kDots) {
        if (dtype == DType::bf16) {
            return body(BFloat16{}, DotUnit{});
        }
    }
    return with_type(dtype, [&](auto type) { return body(type, VectorUnit{brgemm}); });
}

}  // namespace
}  // namespace ipt_fast::cpu
