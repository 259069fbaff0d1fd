// Attention of one head over the pixels of one group, on rows of scratch memory.
#pragma once

#include "gemm.h"
#include "ipt_fast/grid_attention.h"
#include "rows.h"
#include "softmax.h"

namespace ipt_fast {
namespace {

// One after the other from one piece of memory; all sizes are multiples of kChannelPad.
struct Scratch {
    float* next;

    float* take(int64_t size) {
        float* piece = next;
        next += size;
        return piece;
    }
};

// A group's rows from a map of `pixel` values a pixel.
template <typename T, typename Value>
void gather(const Group& g, const T* map, int64_t pixel, int64_t channels, Value* out, int64_t out_row) {
    for (int64_t a = 0; a < g.rows; ++a) {
        load_rows(map + g.pixel(a, 0) * pixel, g.column_step * pixel, g.columns, channels,
                  out + a * g.columns * out_row, out_row);
    }
}

// body(token, pixel) for `count` tokens from `first` on.
template <typename Body>
inline void for_pixels(const Group& g, int64_t first, int64_t count, const Body& body) {
    const int64_t columns = g.columns, step = g.column_step, row_step = g.row_step;
    int64_t b = first % columns, pixel = g.pixel(first / columns, b);
    for (int64_t token = first; token < first + count; ++token, pixel += step) {
        if (b == columns) {
            b = 0;
            pixel += row_step - columns * step;
        }
        body(token, pixel);
        ++b;
    }
}

// out[column][row] = in[row][column] * factor, with zeros up to padded(rows).
inline void transpose_rows(const float* in, int64_t rows, int64_t columns, float factor, float* out) {
    const int64_t row = padded(columns), out_row = padded(rows);
    for (int64_t i = 0; i < out_row; i += kLanes) {
        for (int64_t c = 0; c < columns; c += kLanes) {
            Vec tile[kLanes];
#pragma GCC unroll 16
            for (int64_t j = 0; j < kLanes; ++j) {
                tile[j] = i + j < rows ? load(in + (i + j) * row + c) * factor : Vec{};
            }
            transpose(tile);
#pragma GCC unroll 16
            for (int64_t j = 0; j < kLanes; ++j) {
                store(out + (c + j) * out_row + i, tile[j]);
            }
        }
    }
}

// body(a, b, start, count) for the pieces of lattice rows that `count` tokens from `first` on are made of.
template <typename Body>
inline void for_pieces(const Group& g, int64_t first, int64_t count, const Body& body) {
    int64_t a = first / g.columns, b = first % g.columns;
    for (int64_t start = 0; start < count; b = 0, ++a) {
        const int64_t rest = count - start, piece = g.columns - b < rest ? g.columns - b : rest;
        body(a, b, start, piece);
        start += piece;
    }
}

// The biases of `count` queries from `first` on, [keys][padded(count)], what their scores are added to. They are copied
// in runs, which may go too far: into what is written later or into the padding.
inline void start_scores(const GridAttention& p, const Group& g, const float* bias, int64_t first, int64_t count,
                         float* scores) {
    constexpr int64_t kRun = 8;
    const int64_t rows = g.rows, columns = g.columns, row = padded(count);
    const int64_t last = p.lattice.grid - 1, step = bias_row(p);
    for_pieces(g, first, count, [=](int64_t a, int64_t b, int64_t start, int64_t piece) {
        for (int64_t c = start; c < start + piece; c += kRun) {
            const int64_t room = row - c < kRun ? row - c : kRun;
            const float* source = bias + (a + last) * step + last + b + c - start;
            float* target = scores + c;
            for (int64_t key_a = 0; key_a < rows; ++key_a, source -= step) {
                for (int64_t key_b = 0; key_b < columns; ++key_b, target += row) {
                    if (room == kRun) {
                        memcpy(target, source - key_b, kRun * sizeof(float));
                    } else {
                        memcpy(target, source - key_b, room * sizeof(float));
                    }
                }
            }
        }
    });
    for (int64_t k = 0; k < rows * columns && count < row; ++k) {
        memset(scores + k * row + count, 0, (row - count) * sizeof(float));
    }
}

// One head of one group: rows of queries, keys and values, padded(p.depth) apart. emit(first, count, rows, factors):
// the attended values of queries first to first + count are rows times their factors.
// Scores lie as [keys][queries]: the softmax then needs no sum over the lanes of a vector, and pads no keys.
template <typename Emit>
inline void attend(const GridAttention& p, const Group& g, const float* bias, const float* q, const float* k,
                   const float* v, Scratch scratch, const Emit& emit) {
    const int64_t tokens = g.tokens(), depth = padded(p.depth);
    float* queries = scratch.take(chunk_size(p));
    float* scores = scratch.take(scores_size(p));
    float* out = scratch.take(chunk_size(p));
    for (int64_t first = 0; first < tokens; first += kChunk) {
        const int64_t count = tokens - first < kChunk ? tokens - first : kChunk, row = padded(count);
        float factors[kChunk];
        transpose_rows(q + first * depth, count, p.depth, p.scale * kLog2E, queries);
        start_scores(p, g, bias, first, count, scores);
        product(tokens, row, p.depth, k, depth, queries, row, scores, row, true);
        powers(scores, tokens, row, factors);
        product_transposed(count, p.depth, tokens, scores, row, v, depth, out, depth, false);
        emit(first, count, out, factors);
    }
}

}  // namespace
}  // namespace ipt_fast
