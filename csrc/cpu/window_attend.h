// Channel attention between the Gram matrices and the output: the softmax, and the product with v.
#pragma once

#include <string.h>

#include "gram.h"

namespace ipt_fast::cpu {
namespace {

// Adds a slot's matrix of one branch and squared norms to sums in fp64, which holds the products of any two values of
// fp32: without factors. `units` is room for 2 * depth values.
inline void add_slot(const float* matrix, const float* norms, const float* factors, int64_t depth, double* products,
                     double* squares, double* units) {
    if (all_ones(factors, 2 * depth)) {
        for (int64_t i = 0; i < depth * depth; ++i) {
            products[i] += matrix[i];
        }
        for (int64_t i = 0; i < 2 * depth; ++i) {
            squares[i] += norms[i];
        }
        return;
    }
    for (int64_t i = 0; i < 2 * depth; ++i) {
        units[i] = 1.0 / factors[i];
        squares[i] += norms[i] * units[i] * units[i];
    }
    for (int64_t i = 0; i < depth * depth; ++i) {
        products[i] += matrix[i] * units[i % depth] * units[depth + i / depth];
    }
}

// One window of one head and branch; item is (index * heads + head) * branches + branch.
struct HeadWindow {
    int branch;
    int64_t head, index;  // of the window, counted through all images
    int64_t image, y, x;  // its image, and its place among the windows there

    HeadWindow(const Groups& g, int64_t item)
        : branch(static_cast<int>(item % g.branches)),
          head(item / g.branches % g.heads),
          index(item / g.branches / g.heads) {
        const int64_t across = g.horizontal.windows(), down = g.vertical.windows();
        image = index / across / down;
        y = index / across % down;
        x = index % across;
    }
};

// body(index, block) for the blocks that a window is made of, but empty ones.
template <typename Body>
inline void for_window_blocks(const Groups& g, const HeadWindow& window, const Body& body) {
    for (int64_t i = 0; i < g.vertical.parts; ++i) {
        for (int64_t j = 0; j < g.horizontal.parts; ++j) {
            const int64_t y = g.vertical.block_of(window.branch, window.y, i);
            const int64_t x = g.horizontal.block_of(window.branch, window.x, j);
            if (y < 0 || y >= g.vertical.blocks() || x < 0 || x >= g.horizontal.blocks()) {
                continue;
            }
            const int64_t index = (window.image * g.vertical.blocks() + y) * g.horizontal.blocks() + x;
            const WindowBlock block = g.block(index);
            if (block.tokens() > 0) {
                body(index, block);
            }
        }
    }
}

// The softmax over the first `channels` rows of each of as many columns; zeros elsewhere.
inline void softmax_of_columns(float* scores, int64_t channels, int64_t depth) {
    for (int64_t i = 0; i < depth; i += kLanes) {
        Vec most = broadcast(-__builtin_inff()), sum{};
        for (int64_t j = 0; j < channels; ++j) {
            most = max(most, load(scores + j * depth + i));
        }
        for (int64_t j = 0; j < channels; ++j) {
            const Vec e = exp(load(scores + j * depth + i) - most);
            store(scores + j * depth + i, e);
            sum += e;
        }
        const Vec inverse = lane_index() < static_cast<int32_t>(channels - i) ? 1.0f / sum : Vec{};
        for (int64_t j = 0; j < depth; ++j) {
            float* score = scores + j * depth + i;
            store(score, j < channels ? load(score) * inverse : Vec{});
        }
    }
}

// The matrix of one window, summed over its blocks, becomes the transposed attention [k][q], a copy in each of the
// blocks' slots, or where windows overlap one in g.attention; zeros in the padding. `scratch` holds attend_scratch(g)
// floats.
inline void attend_window(const Groups& g, const HeadWindow& window, float* scratch) {
    const int branch = window.branch;
    const int64_t depth = g.depth, matrix = depth * depth;
    double* totals = reinterpret_cast<double*>(scratch);
    double *const q = totals + matrix, *const k = q + depth;  // squared norms at first, then their inverses
    double* const units = k + depth;
    float* scores = scratch + 2 * (matrix + 4 * depth);
    const auto for_slots = [&](const auto& body) {
        for_window_blocks(g, window, [&](int64_t index, const WindowBlock&) { body(g.slot(index, window.head)); });
    };
    memset(totals, 0, (matrix + 2 * depth) * sizeof(double));
    for_slots([&](float* slot) {
        add_slot(slot + branch * matrix, g.norms(slot, branch), g.factors(slot), depth, totals, q, units);
    });
    for (int64_t i = 0; i < 2 * depth; ++i) {
        const double norm = __builtin_sqrt(q[i]);
        q[i] = 1.0 / (norm < 1e-12 ? 1e-12 : norm);
    }
    for (int64_t j = 0; j < depth; ++j) {
        const double factor = k[j] * g.scale[branch][window.head];
        for (int64_t i = 0; i < depth; ++i) {
            scores[j * depth + i] = static_cast<float>(totals[j * depth + i] * q[i] * factor);
        }
    }
    softmax_of_columns(scores, g.head_channels, depth);
    if (g.overlapping()) {
        memcpy(g.attention_of(window.index, window.head), scores, matrix * sizeof(float));
    } else {
        for_slots([&](float* slot) { memcpy(slot + branch * matrix, scores, matrix * sizeof(float)); });
    }
}

// body(window) for the windows that a block lies in, where windows overlap.
template <typename Body>
inline void for_windows_over(const Groups& g, const WindowBlock& block, const Body& body) {
    for (int64_t i = 0; i < g.vertical.windows_over(block.block_y); ++i) {
        for (int64_t j = 0; j < g.horizontal.windows_over(block.block_x); ++j) {
            const int64_t y = block.image * g.vertical.windows() + g.vertical.first_window(block.block_y) + i;
            body(y * g.horizontal.windows() + g.horizontal.first_window(block.block_x) + j);
        }
    }
}

// What each of them contributes to the mean.
inline float share_of_window(const Groups& g, const WindowBlock& block) {
    const int64_t windows = g.vertical.windows_over(block.block_y) * g.horizontal.windows_over(block.block_x);
    return 1.0f / static_cast<float>(windows);
}

// The mean attention of a block's windows into its slot: results are linear in v, so it gives the mean of theirs.
inline void average_windows(const Groups& g, int64_t index, int64_t head) {
    const WindowBlock block = g.block(index);
    const Vec share = broadcast(share_of_window(g, block));
    float* const slot = g.slot(index, head);
    memset(slot, 0, g.depth * g.depth * sizeof(float));
    for_windows_over(g, block, [&](int64_t window) {
        const float* const attention = g.attention_of(window, head);
        for (int64_t i = 0; i < g.depth * g.depth; i += kLanes) {
            store(slot + i, fma(share, load(attention + i), load(slot + i)));
        }
    });
}

// out[tokens][depth] = sum over the branches of w * attention v, for one tile; v is the head's channels of the map from
// the tile's first pixel on, rows g.width apart. Each branch is a sum of its own, which rounds less than one sum over
// both. `scratch` holds apply_scratch(g) floats.
template <typename B, typename T, typename Unit>
inline void apply_tile(const Groups& g, const Unit& unit, int64_t head, const Tile& tile, const float* slot,
                       Matrix<T> v, Matrix<float> out, float* scratch) {
    const int64_t depth = g.depth, tokens = tile.tokens();
    using Value = typename Unit::Value;
    const Matrix values{reinterpret_cast<Value*>(scratch), tokens, depth, depth};
    float *const top = scratch + kTileTokens * depth, *const bottom = top + kTileTokens * depth,
                 *const room = bottom + kTileTokens * depth;
    for (int64_t y = 0; y < tile.rows; ++y) {
        load_rows(v.slice(y * g.width, tile.columns), values.slice(y * tile.columns, tile.columns));
    }
    const Matrix attention{slot, depth, depth, depth};
    if constexpr (B::count == 1) {
        unit.product(unit.left(values), unit.right(attention, room), out, Accumulate::no);
    } else {
        const Matrix of_shifted{slot + depth * depth, depth, depth, depth};
        const Matrix of_top{top, tokens, depth, depth}, of_bottom{bottom, tokens, depth, depth};
        unit.product(unit.left(values), unit.right(attention, room), of_top, Accumulate::no);
        unit.product(unit.left(values), unit.right(of_shifted, room), of_bottom, Accumulate::no);
        const auto weights = merge_weights<B>(g, head, tile);
        for (int64_t y = 0; y < tile.rows; ++y) {
            for (int64_t x = 0; x < tile.columns; ++x) {
                const int64_t token = y * tile.columns + x;
                const Vec w_top = weights.at(0, y, x), w_bottom = weights.at(1, y, x);
                for (int64_t c = 0; c < depth; c += kLanes) {
                    const Vec sum =
                        fma(w_bottom, load(bottom + token * depth + c), w_top * load(top + token * depth + c));
                    store(out.row(token) + c, sum);
                }
            }
        }
    }
}

}  // namespace
}  // namespace ipt_fast::cpu
