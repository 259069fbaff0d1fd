// Attention of one head over the pixels of one group, on rows of scratch memory.
#pragma once

#include "gemm.h"
#include "grid_attention_kernel.h"
#include "rows.h"
#include "softmax.h"

namespace ipt_fast::cpu {
namespace {

// Pieces are taken one after the other from one piece of memory; all sizes are multiples of kChannelPad.
struct ScratchStack {
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

// The biases of `piece` queries, next to each other in a row of the lattice, for all keys; `room` in a row of scores.
// They are copied in runs, which may go too far where there is room.
template <int64_t run>
inline void copy_biases(const Group& g, const float* bias, int64_t step, int64_t piece, int64_t room, float* scores,
                        int64_t row) {
    const int64_t rows = g.rows, columns = g.columns;
    for (int64_t c = 0; c < piece; c += run) {
        const float* source = bias + c;
        float* target = scores + c;
        for (int64_t a = 0; a < rows; ++a, source -= step) {
            for (int64_t b = 0; b < columns; ++b, target += row) {
                if (room - c >= run) {
                    memcpy(target, source - b, run * sizeof(float));
                } else {
                    memcpy(target, source - b, (room - c) * sizeof(float));
                }
            }
        }
    }
}

// The biases of `count` queries from `first` on, [keys][padded(count)], what their scores are added to.
inline void start_scores(const GridAttention& p, const Group& g, const float* bias, int64_t first, int64_t count,
                         float* scores) {
    const int64_t row = padded(count), step = bias_row(p), last = p.lattice.grid - 1;
    for_pieces(g, first, count, [&](int64_t a, int64_t b, int64_t start, int64_t piece) {
        const float* source = bias + (a + last) * step + last + b;
        // What goes too far is written later.
        if (piece < 16) {
            copy_biases<8>(g, source, step, piece, row - start, scores + start, row);
        } else {
            copy_biases<16>(g, source, step, piece, row - start, scores + start, row);
        }
    });
    for (int64_t k = 0; k < g.tokens() && count < row; ++k) {
        memset(scores + k * row + count, 0, (row - count) * sizeof(float));
    }
}

// One head of one group: rows of queries, keys and values, padded(p.depth) apart. emit(first, count, rows, factors):
// the attended values of queries first to first + count are rows times their factors.
// Scores lie as [keys][queries]: the softmax then needs no sum over the lanes of a vector, and pads no keys.
template <typename Emit>
inline void attend(const GridAttention& p, const Group& g, const float* bias, const float* q, const float* k,
                   const float* v, ScratchStack scratch, const Emit& emit) {
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
}  // namespace ipt_fast::cpu
