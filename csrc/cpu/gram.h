// The pieces of channel attention: Gram matrices of tiles of tokens, softmax, and the product with v.
//
// softmax(scale * q^ k^T) with q^, k^ normalised over a group's tokens needs q and k only through their products and
// norms, which are summed over the blocks of the group. Token weights w multiply both q and k, so w^2 k serves instead.
#pragma once

#include "gemm.h"
#include "ipt_fast/channel_attention.h"
#include "rows.h"
#include "vec.h"

namespace ipt_fast {
namespace {

// The squared weights of a tile's tokens for each branch, or 1 where there is only one branch. A tile lies in one
// window of each branch, so its weights are a rectangle of the map.
template <int branches>
struct TokenWeights {
    const float* first[branches];
    int64_t row;

    TokenWeights(const Groups& g, int64_t head, const Tile& tile) : row(g.vertical.window) {
        for (int branch = 0; branch < branches && branches == 2; ++branch) {
            first[branch] = g.weights(g.token_squares, branch, head, tile);
        }
    }
    Vec at(int branch, int64_t y, int64_t x) const {
        return broadcast(branches == 1 ? 1.0f : first[branch][y * row + x]);
    }
};

inline void add_to(float* sum, Vec value, bool begin) { store(sum, begin ? value : load(sum) + value); }

// Asks for values ahead of their use: a tile's rows are too far apart for the processor to foresee them.
template <typename T>
inline void prefetch_values(const T* first, int64_t count) {
    for (int64_t i = 0; i < count; i += 64 / sizeof(T)) {
        __builtin_prefetch(first + i, 0, 2);
    }
}

// q and k of a tile of tokens, w^2 k of all branches side by side.
template <int branches>
struct GramTile {
    int64_t depth;
    float* q;     // [kTileTokens][depth]
    float* k;     // [kTileTokens][branches][depth]
    float* sums;  // [branches][depth][depth]

    GramTile(int64_t padded_depth, float* scratch)
        : depth(padded_depth), q(scratch), k(q + kTileTokens * depth), sums(k + kTileTokens * branches * depth) {}

    // Channels c to c + kLanes of the token (y, x) of a tile; adds the squares of w q and of w k.
    void put_q(const Tile& tile, int64_t y, int64_t x, int64_t c, Vec value, const TokenWeights<branches>& w,
               Vec (&squares)[branches]) const {
        store(q + (y * tile.columns + x) * depth + c, value);
        const Vec square = value * value;
        for (int branch = 0; branch < branches; ++branch) {
            squares[branch] = fma(w.at(branch, y, x), square, squares[branch]);
        }
    }
    void put_k(const Tile& tile, int64_t y, int64_t x, int64_t c, Vec value, const TokenWeights<branches>& w,
               Vec (&squares)[branches]) const {
        float* target = k + (y * tile.columns + x) * branches * depth + c;
        for (int branch = 0; branch < branches; ++branch) {
            const Vec weighted = w.at(branch, y, x) * value;
            store(target + branch * depth, weighted);
            squares[branch] = fma(weighted, value, squares[branch]);
        }
    }

    // Adds the tile's products to a slot, or begins it. One sum over all of a large block would lose digits.
    void multiply(int64_t tokens, float* slot, bool begin) const {
        float* target = begin ? slot : sums;
        product_transposed(branches * depth, depth, tokens, k, branches * depth, q, depth, target, depth, false);
        if (!begin) {
            for (int64_t i = 0; i < branches * depth * depth; i += kLanes) {
                store(slot + i, load(slot + i) + load(sums + i));
            }
        }
    }
};

// The matrix of one group and branch, summed over its blocks, becomes the transposed attention [k][q], a copy in each
// of the blocks' slots; zeros in the padding. `scratch` holds attend_scratch(g) floats.
inline void attend_group(const Groups& g, int64_t image, int64_t window_y, int64_t window_x, int64_t head, int branch,
                         float* scratch) {
    const int64_t depth = g.depth, matrix = depth * depth;
    double* totals = reinterpret_cast<double*>(scratch);
    double *const q = totals + matrix, *const k = q + depth;  // squared norms at first, then their inverses
    float* scores = scratch + 2 * (matrix + 2 * depth);
    const auto for_slots = [&](const auto& body) {
        for (int64_t i = 0; i < g.vertical.parts; ++i) {
            for (int64_t j = 0; j < g.horizontal.parts; ++j) {
                const int64_t y = g.vertical.block_of(branch, window_y, i);
                const int64_t x = g.horizontal.block_of(branch, window_x, j);
                if (y < g.vertical.blocks() && x < g.horizontal.blocks()) {
                    body(g.slot((image * g.vertical.blocks() + y) * g.horizontal.blocks() + x, head));
                }
            }
        }
    };
    memset(totals, 0, (matrix + 2 * depth) * sizeof(double));
    for_slots([&](float* slot) {
        const float* products = slot + branch * matrix;
        const float* norms = g.norms(slot, branch);
        for (int64_t i = 0; i < matrix; ++i) {
            totals[i] += products[i];
        }
        for (int64_t i = 0; i < 2 * depth; ++i) {
            totals[matrix + i] += norms[i];
        }
    });
    for (int64_t i = 0; i < 2 * depth; ++i) {
        const double norm = __builtin_sqrt(q[i]);
        q[i] = 1.0 / (norm < 1e-12 ? 1e-12 : norm);
    }
    for (int64_t j = 0; j < depth; ++j) {
        const double factor = k[j] * g.scale[head];
        for (int64_t i = 0; i < depth; ++i) {
            scores[j * depth + i] = static_cast<float>(totals[j * depth + i] * q[i] * factor);
        }
    }
    for (int64_t i = 0; i < depth; i += kLanes) {
        Vec most = broadcast(-__builtin_inff()), sum{};
        for (int64_t j = 0; j < g.head_channels; ++j) {
            most = max(most, load(scores + j * depth + i));
        }
        for (int64_t j = 0; j < g.head_channels; ++j) {
            const Vec e = exp(load(scores + j * depth + i) - most);
            store(scores + j * depth + i, e);
            sum += e;
        }
        const Vec inverse = lane_index() < static_cast<int32_t>(g.head_channels - i) ? 1.0f / sum : Vec{};
        for (int64_t j = 0; j < depth; ++j) {
            float* score = scores + j * depth + i;
            store(score, j < g.head_channels ? load(score) * inverse : Vec{});
        }
    }
    for_slots([&](float* slot) { memcpy(slot + branch * matrix, scores, matrix * sizeof(float)); });
}

// Channels c to c + kLanes of a pixel; zeros from `channels` on.
template <typename T>
inline Vec load_channels(const T* pixel, int64_t c, int64_t channels) {
    if (c + kLanes <= channels) {
        return load(pixel + c);
    }
    return c < channels ? load(pixel + c, channels - c) : Vec{};
}

// out[tokens][depth] = sum over the branches of w * attention v, for one tile; v begins at the tile's first pixel.
// Each branch is a sum of its own, which rounds less than one sum over both. `scratch` holds apply_scratch(g) floats.
template <int branches, typename T>
inline void apply_tile(const Groups& g, int64_t head, const Tile& tile, const float* slot, const T* v, int64_t v_pixel,
                       float* out, int64_t out_row, float* scratch) {
    const int64_t depth = g.depth, tokens = tile.tokens();
    float* values = scratch;
    for (int64_t y = 0; y < tile.rows; ++y) {
        load_rows(v + y * g.horizontal.size * v_pixel, v_pixel, tile.columns, g.head_channels,
                  values + y * tile.columns * depth, depth);
    }
    if constexpr (branches == 1) {
        product(tokens, depth, depth, values, depth, slot, depth, out, out_row, false);
    } else {
        float *top = scratch + kTileTokens * depth, *bottom = top + kTileTokens * depth;
        product(tokens, depth, depth, values, depth, slot, depth, top, depth, false);
        product(tokens, depth, depth, values, depth, slot + depth * depth, depth, bottom, depth, false);
        const float* top_weight = g.weights(g.merge[0], 0, head, tile);  // both are laid out by the unshifted windows
        const float* bottom_weight = g.weights(g.merge[1], 0, head, tile);
        for (int64_t y = 0; y < tile.rows; ++y) {
            for (int64_t x = 0; x < tile.columns; ++x) {
                const int64_t token = y * tile.columns + x, at = y * g.vertical.window + x;
                const Vec w_top = broadcast(top_weight[at]), w_bottom = broadcast(bottom_weight[at]);
                for (int64_t c = 0; c < depth; c += kLanes) {
                    const Vec sum =
                        fma(w_bottom, load(bottom + token * depth + c), w_top * load(top + token * depth + c));
                    store(out + token * out_row + c, sum);
                }
            }
        }
    }
}

// body(T{}, Constant<branches>) for the storage type.
template <typename Body>
inline void with_branches(DType dtype, int branches, const Body& body) {
    with_type(dtype, [&](auto type) { branches == 1 ? body(type, Constant<1>{}) : body(type, Constant<2>{}); });
}

}  // namespace
}  // namespace ipt_fast
