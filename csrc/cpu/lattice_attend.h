// Attention of one head over the pixels of one group, on rows of scratch memory.
#pragma once

#include "grid_attention_kernel.h"
#include "rows.h"
#include "softmax.h"
#include "units.h"

namespace ipt_fast::cpu {
namespace {

// Hands out pieces of a thread's memory, one after the other. All sizes are multiples of kChannelPad.
struct ScratchStack {
    float* next;

    float* take(int64_t size) {
        float* piece = next;
        next += size;
        return piece;
    }
};

// A group's rows from a map, whose rows are pixels.
template <typename T, typename Value>
void gather(const Group& g, Matrix<T> map, Matrix<Value> out) {
    for (int64_t a = 0; a < g.rows; ++a) {
        const Matrix pixels{map.row(g.pixel(a, 0)), g.columns, map.columns, g.column_step * map.stride};
        load_rows(pixels, out.from(a * g.columns, 0));
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

// out = the transpose of in * factor, its rows with zeros up to padded(in.rows). Returns a view of it.
inline Matrix<float> transpose_rows(Matrix<const float> in, float factor, float* out) {
    const int64_t rows = in.rows, columns = in.columns, row = in.stride, out_row = padded(rows);
    for (int64_t i = 0; i < out_row; i += kLanes) {
        for (int64_t c = 0; c < columns; c += kLanes) {
            Vec tile[kLanes];
#pragma GCC unroll 16
            for (int64_t j = 0; j < kLanes; ++j) {
                tile[j] = i + j < rows ? load(in.data + (i + j) * row + c) * factor : Vec{};
            }
            transpose(tile);
#pragma GCC unroll 16
            for (int64_t j = 0; j < kLanes; ++j) {
                store(out + (c + j) * out_row + i, tile[j]);
            }
        }
    }
    return {out, columns, out_row, out_row};
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

// The biases of `piece` queries, next to each other in a row of the lattice, for all keys: `bias` is where the table
// has that of the first query and key, `step` the length of its rows. They are copied in runs, which may go too far, up
// to the last column of the scores.
template <int64_t run>
inline void copy_biases(const Group& g, const float* bias, int64_t step, int64_t piece, Matrix<float> scores) {
    const int64_t rows = g.rows, columns = g.columns, room = scores.columns, row = scores.stride;
    for (int64_t c = 0; c < piece; c += run) {
        const float* source = bias + c;
        float* target = scores.data + c;
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

// The biases of `count` queries (columns) from `first` on, what their scores are added to; zeros in the padding.
inline void start_scores(const GridAttention& p, const Group& g, const float* bias, int64_t first, int64_t count,
                         Matrix<float> scores) {
    const int64_t row = scores.columns, step = bias_row(p), last = p.lattice.grid - 1;
    for_pieces(g, first, count, [&](int64_t a, int64_t b, int64_t start, int64_t piece) {
        const float* source = bias + (a + last) * step + last + b;
        // What goes too far is written later.
        if (piece < 16) {
            copy_biases<8>(g, source, step, piece, scores.from(0, start));
        } else {
            copy_biases<16>(g, source, step, piece, scores.from(0, start));
        }
    });
    for (int64_t k = 0; k < g.tokens() && count < row; ++k) {
        memset(scores.row(k) + count, 0, (row - count) * sizeof(float));
    }
}

// One head of one group, whose tokens are the rows of q, k and v. emit(first, rows, factors): the attended values of
// the queries from `first` on are rows times their factors.
// Scores lie as [keys][queries]: the softmax then needs no sum over the lanes of a vector, and pads no keys.
template <typename Unit, typename Emit>
inline void attend(const GridAttention& p, const Unit& unit, const Group& g, const float* bias, Matrix<const float> q,
                   Matrix<const float> k, Matrix<const float> v, ScratchStack scratch, const Emit& emit) {
    const int64_t tokens = g.tokens();
    float* const for_queries = scratch.take(chunk_size(p));
    float* const for_scores = scratch.take(scores_size(p));
    float* const for_values = scratch.take(chunk_size(p));
    float* const queries_room = scratch.take(chunk_size(p));
    float* const weights_room = scratch.take(scores_room(p));
    const auto keys = unit.left(unit.rows(k, scratch.take(head_room(p))));
    const auto attended = unit.right(v, scratch.take(head_room(p)));
    for (int64_t first = 0; first < tokens; first += kChunk) {
        const int64_t count = tokens - first < kChunk ? tokens - first : kChunk, row = padded(count);
        const Matrix scores{for_scores, tokens, row, row};
        const Matrix values{for_values, count, p.depth, padded(p.depth)};
        float factors[kChunk];
        const Matrix queries = transpose_rows(q.slice(first, count), p.scale * kLog2E, for_queries);
        start_scores(p, g, bias, first, count, scores);
        unit.product(keys, unit.right(queries, queries_room), scores, Accumulate::yes);
        powers(scores, factors);
        const auto weights = unit.left_transposed({for_scores, tokens, count, row}, weights_room);
        unit.product(weights, attended, values, Accumulate::no);
        emit(first, values, factors);
    }
}

}  // namespace
}  // namespace ipt_fast::cpu
