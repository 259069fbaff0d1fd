// Products of matrices of bf16 on the matrix unit of x86 processors (AMX), by its instructions.
//
// A tile has up to 16 rows of 64 bytes. A product of tiles, 16 x 16 values of fp32 from 16 pairs each, takes as long as
// its left tile has rows, so a block of two by two tiles of c, which loads four tiles for four products, keeps the unit
// busy. Rows and pairs that do not fill a tile get tiles of their own size, by another configuration.
#pragma once

#include <string.h>

#include "kernels.h"

namespace ipt_fast::cpu {
namespace {

constexpr int64_t kTileRows = 16, kTilePairs = 16, kTileColumns = 16;

// What LDTILECFG reads: the rows of each tile and the bytes of a row.
struct alignas(64) TileConfiguration {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};

    void set(int tile, int64_t tile_rows, int64_t values) {
        rows[tile] = static_cast<uint8_t>(tile_rows);
        bytes[tile] = static_cast<uint16_t>(4 * values);
    }
};

// Tiles 0 to 3 are of c, 4 and 5 of a, 6 and 7 of b.
template <int tile>
inline void load_tile(const void* data, int64_t stride) {
    asm volatile("tileloadd (%0,%1,4), %%tmm%c2" ::"r"(data), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
inline void store_tile(void* data, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,4)" ::"r"(data), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
inline void clear_tile() {
    asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}
template <int c, int a, int b>
inline void multiply_tiles() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}

template <int tile>
inline void begin_tile(const float* c, int64_t stride, Accumulate accumulate) {
    if (accumulate == Accumulate::yes) {
        load_tile<tile>(c, stride);
    } else {
        clear_tile<tile>();
    }
}

// c (+)= a b for a block of up to two by two tiles; `step` pairs at a time divide those of a.
template <bool two_down, bool two_across>
inline void tile_block(Matrix<const Pair> a, Matrix<const Pair> b, Matrix<float> c, int64_t step,
                       Accumulate accumulate) {
    float* const below = c.data + kTileRows * c.stride;
    begin_tile<0>(c.data, c.stride, accumulate);
    if constexpr (two_across) begin_tile<1>(c.data + kTileColumns, c.stride, accumulate);
    if constexpr (two_down) begin_tile<2>(below, c.stride, accumulate);
    if constexpr (two_down && two_across) begin_tile<3>(below + kTileColumns, c.stride, accumulate);
    for (int64_t k = 0; k < a.columns; k += step) {
        load_tile<6>(b.row(k), b.stride);
        load_tile<4>(a.data + k, a.stride);
        multiply_tiles<0, 4, 6>();
        if constexpr (two_across) {
            load_tile<7>(b.row(k) + kTileColumns, b.stride);
            multiply_tiles<1, 4, 7>();
        }
        if constexpr (two_down) {
            load_tile<5>(a.row(kTileRows) + k, a.stride);
            multiply_tiles<2, 5, 6>();
            if constexpr (two_across) multiply_tiles<3, 5, 7>();
        }
    }
    store_tile<0>(c.data, c.stride);
    if constexpr (two_across) store_tile<1>(c.data + kTileColumns, c.stride);
    if constexpr (two_down) store_tile<2>(below, c.stride);
    if constexpr (two_down && two_across) store_tile<3>(below + kTileColumns, c.stride);
}

// The same of thirds (thirds.h): one group of 16 pairs after the other. Small products come first.
template <bool two_down, bool two_across>
inline void thirds_block(Matrix<const Pair> a, Matrix<const Pair> b, Matrix<float> c, Accumulate accumulate) {
    float* const below = c.data + kTileRows * c.stride;
    begin_tile<0>(c.data, c.stride, accumulate);
    if constexpr (two_across) begin_tile<1>(c.data + kTileColumns, c.stride, accumulate);
    if constexpr (two_down) begin_tile<2>(below, c.stride, accumulate);
    if constexpr (two_down && two_across) begin_tile<3>(below + kTileColumns, c.stride, accumulate);
    const auto load_left = [&](int64_t k) {
        load_tile<4>(a.data + k, a.stride);
        if constexpr (two_down) load_tile<5>(a.row(kTileRows) + k, a.stride);
    };
    const auto load_right = [&](int64_t k) {
        load_tile<6>(b.row(k), b.stride);
        if constexpr (two_across) load_tile<7>(b.row(k) + kTileColumns, b.stride);
    };
    const auto multiply = [] {
        multiply_tiles<0, 4, 6>();
        if constexpr (two_across) multiply_tiles<1, 4, 7>();
        if constexpr (two_down) multiply_tiles<2, 5, 6>();
        if constexpr (two_down && two_across) multiply_tiles<3, 5, 7>();
    };
    for (int64_t k = 0; k < a.columns; k += 3 * kTilePairs) {
        const int64_t high = k, middle = k + kTilePairs, low = k + 2 * kTilePairs;
        load_left(low);
        load_right(high);
        multiply();
        load_left(middle);
        multiply();
        load_right(middle);
        multiply();
        load_left(high);
        multiply();
        load_right(low);
        multiply();
        load_right(high);
        multiply();
    }
    store_tile<0>(c.data, c.stride);
    if constexpr (two_across) store_tile<1>(c.data + kTileColumns, c.stride);
    if constexpr (two_down) store_tile<2>(below, c.stride);
    if constexpr (two_down && two_across) store_tile<3>(below + kTileColumns, c.stride);
}

// The configuration in use by this thread: rows of the upper and of the lower tiles, and pairs.
thread_local uint32_t tiles_in_use = 0;

inline void use_tiles(int64_t upper, int64_t lower, int64_t pairs) {
    const uint32_t wanted = static_cast<uint32_t>(upper | lower << 8 | pairs << 16);
    if (tiles_in_use == wanted) {
        return;
    }
    TileConfiguration configuration;
    for (int column = 0; column < 2; ++column) {
        configuration.set(column, upper, kTileColumns);
        configuration.set(6 + column, pairs, kTileColumns);
        if (lower > 0) {
            configuration.set(2 + column, lower, kTileColumns);
        }
    }
    configuration.set(4, upper, pairs);
    if (lower > 0) {
        configuration.set(5, lower, pairs);
    }
    asm volatile("ldtilecfg %0" ::"m"(configuration));
    tiles_in_use = wanted;
}

inline void release_tiles() {
    if (tiles_in_use != 0) {
        asm volatile("tilerelease");
        tiles_in_use = 0;
    }
}

// Rows [first, first + upper + lower) of c (+)= a b.
inline void multiply_rows(Matrix<const Pair> a, Matrix<const Pair> b, Matrix<float> c, int64_t step,
                          Accumulate accumulate, int64_t first, int64_t upper, int64_t lower) {
    const Matrix left = a.from(first, 0);
    const Matrix target = c.from(first, 0);
    const bool wide = c.columns > kTileColumns;
    use_tiles(upper, lower, step);
    if (lower > 0) {
        wide ? tile_block<true, true>(left, b, target, step, accumulate)
             : tile_block<true, false>(left, b, target, step, accumulate);
    } else {
        wide ? tile_block<false, true>(left, b, target, step, accumulate)
             : tile_block<false, false>(left, b, target, step, accumulate);
    }
}

// c (+)= a b for pairs of a that `step` divides; c has 16 or 32 columns. A configuration takes as long as many
// products: rows that do not fill two tiles are computed with those before them, once more, where that changes nothing.
inline void multiply_steps(Matrix<const Pair> a, Matrix<const Pair> b, Matrix<float> c, int64_t step,
                           Accumulate accumulate) {
    constexpr int64_t kBlock = 2 * kTileRows;
    const int64_t whole = c.rows / kBlock * kBlock, rest = c.rows - whole;
    for (int64_t first = 0; first < whole; first += kBlock) {
        multiply_rows(a, b, c, step, accumulate, first, kTileRows, kTileRows);
    }
    if (rest > 0 && whole > 0 && accumulate == Accumulate::no) {
        multiply_rows(a, b, c, step, accumulate, c.rows - kBlock, kTileRows, kTileRows);
    } else if (rest > 0) {
        const int64_t upper = rest < kTileRows ? rest : kTileRows;
        multiply_rows(a, b, c, step, accumulate, whole, upper, rest - upper);
    }
}

// c (+)= a b, of 16 or 32 columns; 8 divides the pairs of a.
inline void multiply_on_tiles(Matrix<const Pair> a, Matrix<const Pair> b, Matrix<float> c, Accumulate accumulate) {
    const int64_t whole = a.columns / kTilePairs * kTilePairs, rest = a.columns - whole;
    if (whole > 0) {
        multiply_steps({a.data, a.rows, whole, a.stride}, b, c, kTilePairs, accumulate);
    }
    if (rest > 0) {
        multiply_steps(a.from(0, whole), b.from(whole, 0), c, rest, whole > 0 ? Accumulate::yes : accumulate);
    }
}

inline void multiply_thirds_of_tiles(Matrix<const Pair> a, Matrix<const Pair> b, Matrix<float> c,
                                     Accumulate accumulate) {
    const bool wide = c.columns > kTileColumns;
    if (c.rows > kTileRows) {
        wide ? thirds_block<true, true>(a, b, c, accumulate) : thirds_block<true, false>(a, b, c, accumulate);
    } else {
        wide ? thirds_block<false, true>(a, b, c, accumulate) : thirds_block<false, false>(a, b, c, accumulate);
    }
}

// c (+)= a b of thirds: up to 32 rows and 16 or 32 columns. Whole tiles of rows of a are read, whatever c has.
inline void multiply_thirds_on_tiles(Matrix<const Pair> a, Matrix<const Pair> b, Matrix<float> c,
                                     Accumulate accumulate) {
    use_tiles(kTileRows, kTileRows, kTilePairs);
    if (c.rows % kTileRows == 0) {
        return multiply_thirds_of_tiles(a, b, c, accumulate);
    }
    alignas(64) float sums[2 * kTileRows * 2 * kTileColumns];
    const Matrix whole{sums, round_up(c.rows, kTileRows), c.columns, c.columns};
    const int64_t bytes = c.columns * static_cast<int64_t>(sizeof(float));
    for (int64_t i = 0; accumulate == Accumulate::yes && i < c.rows; ++i) {
        memcpy(whole.row(i), c.row(i), bytes);
    }
    multiply_thirds_of_tiles(a, b, whole, accumulate);
    for (int64_t i = 0; i < c.rows; ++i) {
        memcpy(c.row(i), whole.row(i), bytes);
    }
}

}  // namespace
}  // namespace ipt_fast::cpu
