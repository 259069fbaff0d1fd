// Products of small fp32 matrices that lie in the first or second cache: the arithmetic core of the fused kernels.
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
struct LeftRows {
    const float* data;
    int64_t stride;

    const float* at(int64_t i, int64_t k) const { return data + i * stride + k; }
    LeftRows from(int64_t i, int64_t k) const { return {at(i, k), stride}; }
};
struct LeftColumns {
    const float* data;
    int64_t stride;

    const float* at(int64_t i, int64_t k) const { return data + i + k * stride; }
    LeftColumns from(int64_t i, int64_t k) const { return {at(i, k), stride}; }
};

// c (+)= a b for `rows` rows of a and c and `vectors` vectors of columns. What c holds is added to the finished sums: a
// few short sums round less than one long one.
template <int rows, int vectors, typename Left>
inline __attribute__((always_inline)) void tile(int64_t depth, Left a, Rows<const float> b, Rows<float> c,
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
        Vec right[vectors];
#pragma GCC unroll 4
        for (int j = 0; j < vectors; ++j) {
            right[j] = load(b.row(k) + j * kLanes);
        }
#pragma GCC unroll 16
        for (int i = 0; i < rows; ++i) {
            const Vec left = broadcast(*a.at(i, k));
#pragma GCC unroll 4
            for (int j = 0; j < vectors; ++j) {
                sums[i][j] = fma(left, right[j], sums[i][j]);
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
template <int vectors, typename Left>
void panel_product(int64_t rows, int64_t depth, Left a, Rows<const float> b, Rows<float> c, Accumulate accumulate) {
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
        const Rows<const float> right = b(panels, panel);
        const Rows<float> target{c.data + panels.first(panel) * kLanes, c.stride};
        with_width(panels.width(panel), [&](auto vectors) __attribute__((always_inline)) {
            int64_t k = 0;
            do {  // once for a depth of 0
                const int64_t block = depth - k < kDepthBlock ? depth - k : kDepthBlock;
                panel_product<decltype(vectors)::value>(c.rows, block, a.from(0, k), {right.row(k), right.stride},
                                                        target, k > 0 ? Accumulate::yes : accumulate);
                k += block;
            } while (k < depth);
        });
    }
}

// The left operand `of`, transposed.
struct Transposed {
    Matrix<const float> of;
};

inline Transposed transposed(Matrix<const float> a) { return {a}; }

inline auto panels_of(Matrix<const float> b) {
    return [=](const Panels& panels, int64_t panel) {
        return Rows<const float>{b.data + panels.first(panel) * kLanes, b.stride};
    };
}

// c (+)= a b. Columns are padded to whole vectors in b and c.
inline void product(Matrix<const float> a, Matrix<const float> b, Matrix<float> c, Accumulate accumulate) {
    product_of(a.columns, LeftRows{a.data, a.stride}, panels_of(b), c, accumulate);
}
inline void product(Transposed a, Matrix<const float> b, Matrix<float> c, Accumulate accumulate) {
    product_of(a.of.rows, LeftColumns{a.of.data, a.of.stride}, panels_of(b), c, accumulate);
}

// rows[i] = row k + i of a weight matrix, kLanes columns from `column` on, as fp32; 0 outside.
template <typename T>
inline void load_weight(const Weight& w, int64_t k, int64_t column, Vec (&rows)[kLanes]) {
    const T* data = static_cast<const T*>(w.data) + column * w.column_stride + k * w.depth_stride;
    const int64_t depth = w.depth - k < kLanes ? w.depth - k : kLanes;
    const int64_t columns = w.columns - column < kLanes ? w.columns - column : kLanes;
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

// Products with a packed weight matrix on the vector unit. `Value` is what the left operand's rows are made of.
struct VectorUnit {
    using Value = float;

    // Bytes of a packed weight.
    static int64_t packed_size(int64_t columns, int64_t depth) {
        return round_up(columns, kChannelPad) * depth * static_cast<int64_t>(sizeof(float));
    }

    // Panels one after the other, each [depth][columns of the panel].
    template <typename T>
    void pack(const Weight& w, void* packed) const {
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
        const float* b = static_cast<const float*>(packed);
        const int64_t depth = a.columns;
        const auto panel_of_b = [&](const Panels& panels, int64_t panel) {
            return Rows<const float>{b + panels.first(panel) * kLanes * depth, panels.width(panel) * kLanes};
        };
        product_of(depth, LeftRows{a.data, a.stride}, panel_of_b, c, accumulate);
    }
};

// The same on the matrix unit (AMX), bf16 with fp32 sums. Rows of the left operand are padded to kChannelPad with
// zeros.
struct MatrixUnit {
    using Value = BFloat16;
    static constexpr int64_t kBlock = 32;  // columns of one call

    Brgemm brgemm;

    static int64_t packed_size(int64_t columns, int64_t depth) {
        return padded(columns) * padded(depth) * static_cast<int64_t>(sizeof(BFloat16));
    }

    // Blocks of kBlock columns (the last may have 16), each [depth / 2][columns][2].
    template <typename T>
    void pack(const Weight& w, void* packed) const {
        BFloat16* out = static_cast<BFloat16*>(packed);
        const int64_t columns = padded(w.columns), depth = padded(w.depth);
        for (int64_t first = 0; first < columns; first += kBlock) {
            const int64_t width = columns - first < kBlock ? columns - first : kBlock;
            for (int64_t column = 0; column < width; column += kLanes) {
                for (int64_t k = 0; k < depth; k += kLanes) {
                    Vec rows[kLanes];
                    load_weight<T>(w, k, first + column, rows);
                    for (int64_t i = 0; i < kLanes; i += 2) {
                        const Bits low = __builtin_convertvector(to_bf16(rows[i]), Bits);
                        const Bits high = __builtin_convertvector(to_bf16(rows[i + 1]), Bits);
                        store(reinterpret_cast<float*>(out) + (k + i) / 2 * width + column, (Vec)(low | high << 16));
                    }
                }
            }
            out += depth * width;
        }
    }

    void multiply(Matrix<const BFloat16> a, const void* packed, Matrix<float> c, Accumulate accumulate) const {
        const int64_t columns = padded(c.columns), depth = padded(a.columns);
        const BFloat16* b = static_cast<const BFloat16*>(packed);
        for (int64_t first = 0; first < columns; first += kBlock) {
            const int64_t width = columns - first < kBlock ? columns - first : kBlock;
            brgemm({&a.data->bits, a.rows, depth, a.stride}, &b[first * depth].bits,
                   {c.data + first, c.rows, width, c.stride}, accumulate);
        }
    }
};

// body(T{}, unit) for the storage type and the unit in use: the matrix unit, where there is one, for bf16.
template <typename Body>
inline auto with_types(DType dtype, [[maybe_unused]] Brgemm brgemm, const Body& body) {
    if constexpr (kMatrixUnit) {
        if (dtype == DType::bf16 && brgemm != nullptr) {
            return body(BFloat16{}, MatrixUnit{brgemm});
        }
    }
    return with_type(dtype, [&](auto type) { return body(type, VectorUnit{}); });
}

}  // namespace
}  // namespace ipt_fast::cpu
