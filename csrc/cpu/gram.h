// The pieces of channel attention: Gram matrices of tiles of tokens, softmax, and the product with v.
//
// softmax(scale * q^ k^T) with q^, k^ normalised over a group's tokens needs q and k only through their products and
// norms, which are summed over the blocks of the group. Token weights w multiply both q and k, so w^2 k serves instead.
#pragma once

#include "channel_attention_kernel.h"
#include "gemm.h"
#include "rows.h"
#include "vec.h"

namespace ipt_fast::cpu {
namespace {

// Weights of a tile's tokens for each branch, or 1 where there is only one branch. A tile lies in one window of each
// branch, so its weights are a rectangle of a (p, p) map.
template <int branches>
struct TileWeights {
    const float* first[branches];
    int64_t row;

    Vec at(int branch, int64_t y, int64_t x) const {
        return broadcast(branches == 1 ? 1.0f : first[branch][y * row + x]);
    }
};

// The squares of the token weights.
template <int branches>
inline TileWeights<branches> token_squares(const Groups& g, int64_t head, const Tile& tile) {
    TileWeights<branches> weights{{}, g.vertical.window};
    for (int branch = 0; branch < branches && branches == 2; ++branch) {
        weights.first[branch] = g.weights(g.token_squares, branch, head, tile);
    }
    return weights;
}

// The weights of the branches' outputs, both laid out by the unshifted windows.
template <int branches>
inline TileWeights<branches> merge_weights(const Groups& g, int64_t head, const Tile& tile) {
    TileWeights<branches> weights{{}, g.vertical.window};
    for (int branch = 0; branch < branches && branches == 2; ++branch) {
        weights.first[branch] = g.weights(g.merge[branch], 0, head, tile);
    }
    return weights;
}

inline bool all_of(IntVec lanes) {
    int64_t pairs[kLanes / 2], all = -1;
    memcpy(pairs, &lanes, sizeof(pairs));
    for (const int64_t pair : pairs) {
        all &= pair;
    }
    return all == -1;
}

inline bool all_ones(const float* values, int64_t count) {
    IntVec ones = IntVec{} - 1;
    for (int64_t i = 0; i < count; i += kLanes) {
        ones &= load(values + i) == broadcast(1.0f);
    }
    return all_of(ones);
}

// Squared norms of a tile whose sums, and the products of two such channels, are far from fp32's limits.
constexpr float kLeastSquare = 0x1p-80f, kMostSquare = 0x1p100f;

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
    int64_t channels, depth;
    float* q;        // [kTileTokens][depth]
    float* k;        // [kTileTokens][branches][depth]
    float* sums;     // [branches][depth][depth]
    float* squares;  // [branches][2][depth], of q and k
    float* factors;  // [2][depth]

    GramTile(const Groups& g, float* scratch)
        : channels(g.head_channels),
          depth(g.depth),
          q(scratch),
          k(q + kTileTokens * depth),
          sums(k + kTileTokens * branches * depth),
          squares(sums + branches * depth * depth),
          factors(squares + 2 * branches * depth) {}

    // Channels c to c + kLanes of the token (y, x) of a tile; adds the squares of w q and of w k.
    void put_q(const Tile& tile, int64_t y, int64_t x, int64_t c, Vec value, const TileWeights<branches>& w,
               Vec (&sum)[branches]) const {
        store(q + (y * tile.columns + x) * depth + c, value);
        const Vec square = value * value;
        for (int branch = 0; branch < branches; ++branch) {
            sum[branch] = fma(w.at(branch, y, x), square, sum[branch]);
        }
    }
    void put_k(const Tile& tile, int64_t y, int64_t x, int64_t c, Vec value, const TileWeights<branches>& w,
               Vec (&sum)[branches]) const {
        float* target = k + (y * tile.columns + x) * branches * depth + c;
        for (int branch = 0; branch < branches; ++branch) {
            const Vec weighted = w.at(branch, y, x) * value;
            store(target + branch * depth, weighted);
            sum[branch] = fma(weighted, value, sum[branch]);
        }
    }
    // Their sums over the tile, of q (0) or k (1).
    void put_squares(int64_t of_k, int64_t c, const Vec (&sum)[branches]) const {
        for (int branch = 0; branch < branches; ++branch) {
            store(squares + (2 * branch + of_k) * depth + c, sum[branch]);
        }
    }

    // Adds the tile to a slot's matrices, squared norms and factors, or begins them. One sum over all of a large block
    // would lose digits. read_k(rows) puts k without weights to [tokens][depth], if it is needed again.
    template <typename ReadK>
    void add(const Tile& tile, const TileWeights<branches>& w, float* matrices, float* norms, float* slot_factors,
             bool begin, const ReadK& read_k) const {
        for (int64_t i = 0; i < 2 * depth && begin; i += kLanes) {
            store(slot_factors + i, broadcast(1.0f));
        }
        if (!plain(slot_factors)) {
            float* rows = k + (branches - 1) * kTileTokens * depth;  // at the end: they make room as they are weighted
            read_k(rows);
            scale(tile, w, rows, slot_factors);
            add_scaled(tile.tokens(), matrices, norms, slot_factors, begin);
            return;
        }
        multiply(tile.tokens(), matrices, begin);
        for (int64_t i = 0; i < 2 * branches * depth; i += kLanes) {
            add_to(norms + i, load(squares + i), begin);
        }
    }

    // Adds the products alone.
    void multiply(int64_t tokens, float* matrices, bool begin) const {
        const Matrix weighted{k, tokens, branches * depth, branches * depth}, plain{q, tokens, depth, depth};
        const Matrix target{begin ? matrices : sums, branches * depth, depth, depth};
        product(transposed(weighted), plain, target, Accumulate::no);
        if (!begin) {
            for (int64_t i = 0; i < branches * depth * depth; i += kLanes) {
                store(matrices + i, load(matrices + i) + load(sums + i));
            }
        }
    }

  private:
    Vec largest_square(int64_t i) const {
        const Vec first = load(squares + i);
        return branches == 1 ? first : max(first, load(squares + 2 * (branches - 1) * depth + i));
    }
    IntVec in_range(int64_t i) const {  // not where a square is NaN
        const Vec square = largest_square(i);
        return (square >= broadcast(kLeastSquare)) & (square <= broadcast(kMostSquare));
    }

    // Whether the tile needs no factors and its slot has none.
    bool plain(const float* slot_factors) const {
        const Vec one = broadcast(1.0f);
        IntVec plain = IntVec{} - 1;
        for (int64_t c = 0; c < depth; c += kLanes) {
            plain &= (in_range(c) & in_range(depth + c)) | (lane_index() >= static_cast<int32_t>(channels - c));
            plain &= (load(slot_factors + c) == one) & (load(slot_factors + depth + c) == one);
        }
        return all_of(plain);
    }

    // Finds the factors of q and of k (raw, in `rows`) that bring channels out of range to about 1, and stages them
    // again. A channel of zeros takes the slot's factor.
    void scale(const Tile& tile, const TileWeights<branches>& w, const float* rows, const float* slot_factors) const {
        for (int64_t i = 0; i < 2 * depth; i += kLanes) {
            const float* values = i < depth ? q + i : rows + i - depth;
            Bits largest{};
            for (int64_t token = 0; token < tile.tokens(); ++token) {
                const Bits magnitude = (Bits)load(values + token * depth) & 0x7fffffff;
                largest = magnitude > largest ? magnitude : largest;
            }
            const Bits exponent = largest & 0x7f800000, most = Bits{} + (253u << 23);
            const Vec inverse = (Vec)((254u << 23) - (exponent < most ? exponent : most));
            const Vec factor = in_range(i) ? broadcast(1.0f) : inverse;
            store(factors + i, largest == 0 ? load(slot_factors + i) : factor);
        }
        for (int64_t i = 0; i < 2 * branches * depth; i += kLanes) {
            store(squares + i, Vec{});
        }
        for (int64_t y = 0; y < tile.rows; ++y) {
            for (int64_t x = 0; x < tile.columns; ++x) {
                const int64_t token = y * tile.columns + x;
                for (int64_t c = 0; c < depth; c += kLanes) {
                    Vec of_q[branches], of_k[branches];
                    for (int branch = 0; branch < branches; ++branch) {
                        of_q[branch] = load(squares + 2 * branch * depth + c);
                        of_k[branch] = load(squares + (2 * branch + 1) * depth + c);
                    }
                    put_q(tile, y, x, c, load(q + token * depth + c) * load(factors + c), w, of_q);
                    put_k(tile, y, x, c, load(rows + token * depth + c) * load(factors + depth + c), w, of_k);
                    put_squares(0, c, of_q);
                    put_squares(1, c, of_k);
                }
            }
        }
    }

    // add(), of a tile or to a slot with factors: both take the smaller one, unless a channel of the slot is still
    // zero.
    void add_scaled(int64_t tokens, float* matrices, float* norms, float* slot_factors, bool begin) const {
        multiply(tokens, begin ? matrices : sums, true);
        float *const ours = q, *const theirs = ours + 2 * depth;  // what either is multiplied by; q is done with
        for (int64_t i = 0; i < 2 * depth; i += kLanes) {
            const Vec factor = load(factors + i), of_slot = load(slot_factors + i);
            IntVec none = IntVec{} - 1;
            for (int branch = 0; branch < branches && !begin; ++branch) {
                none &= load(norms + 2 * branch * depth + i) == Vec{};
            }
            const Vec common = none ? factor : min(factor, of_slot);
            store(ours + i, common / factor);
            store(theirs + i, none ? broadcast(1.0f) : common / of_slot);
            store(slot_factors + i, common);
            for (int branch = 0; branch < branches; ++branch) {
                float* norm = norms + 2 * branch * depth + i;
                const Vec a = load(ours + i), b = load(theirs + i);
                const Vec square = load(squares + 2 * branch * depth + i) * a * a;
                store(norm, begin ? square : load(norm) * b * b + square);
            }
        }
        for (int64_t row = 0; row < branches * depth && !begin; ++row) {
            const int64_t j = depth + row % depth;
            for (int64_t i = 0; i < depth; i += kLanes) {
                float* sum = matrices + row * depth + i;
                store(sum, load(sum) * theirs[j] * load(theirs + i) +
                               load(sums + row * depth + i) * ours[j] * load(ours + i));
            }
        }
    }
};

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

// The matrix of one group and branch, summed over its blocks, becomes the transposed attention [k][q], a copy in each
// of the blocks' slots; zeros in the padding. `scratch` holds attend_scratch(g) floats.
inline void attend_group(const Groups& g, int64_t image, int64_t window_y, int64_t window_x, int64_t head, int branch,
                         float* scratch) {
    const int64_t depth = g.depth, matrix = depth * depth;
    double* totals = reinterpret_cast<double*>(scratch);
    double *const q = totals + matrix, *const k = q + depth;  // squared norms at first, then their inverses
    double* const units = k + depth;
    float* scores = scratch + 2 * (matrix + 4 * depth);
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
        add_slot(slot + branch * matrix, g.norms(slot, branch), g.factors(slot), depth, totals, q, units);
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

// out[tokens][depth] = sum over the branches of w * attention v, for one tile; v is the head's channels of the map from
// the tile's first pixel on. Each branch is a sum of its own, which rounds less than one sum over both. `scratch` holds
// apply_scratch(g) floats.
template <int branches, typename T>
inline void apply_tile(const Groups& g, int64_t head, const Tile& tile, const float* slot, Matrix<T> v,
                       Matrix<float> out, float* scratch) {
    const int64_t depth = g.depth, tokens = tile.tokens();
    const Matrix values{scratch, tokens, depth, depth};
    for (int64_t y = 0; y < tile.rows; ++y) {
        load_rows(v.slice(y * g.horizontal.size, tile.columns), values.slice(y * tile.columns, tile.columns));
    }
    const Matrix attention{slot, depth, depth, depth};
    if constexpr (branches == 1) {
        product(values, attention, out, Accumulate::no);
    } else {
        const Matrix of_shifted{slot + depth * depth, depth, depth, depth};
        float *top = scratch + kTileTokens * depth, *bottom = top + kTileTokens * depth;
        product(values, attention, Matrix{top, tokens, depth, depth}, Accumulate::no);
        product(values, of_shifted, Matrix{bottom, tokens, depth, depth}, Accumulate::no);
        const TileWeights<branches> weights = merge_weights<branches>(g, head, tile);
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

// body(T{}, Constant<branches>) for the storage type.
template <typename Body>
inline void with_branches(DType dtype, int branches, const Body& body) {
    with_type(dtype, [&](auto type) { branches == 1 ? body(type, Constant<1>{}) : body(type, Constant<2>{}); });
}

}  // namespace
}  // namespace ipt_fast::cpu
