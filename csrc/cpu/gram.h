// The first piece of channel attention: Gram matrices of tiles of tokens. window_attend.h has the rest.
//
// softmax(scale * q^ k^T) with q^, k^ normalised over a group's tokens needs q and k only through their products and
// norms, which are summed over the blocks of the group. Token weights w multiply both q and k, so w^2 k serves instead.
#pragma once

#include "channel_attention_kernel.h"
#include "rows.h"
#include "units.h"
#include "vec.h"

namespace ipt_fast::cpu {
namespace {

// The branches that are computed of a block: how many, and whether its tokens have weights. In three forms: one without
// weights, both, and the first of both, whose result is then not weighted.
template <int n, bool weights>
struct Branches {
    static constexpr int count = n;
    static constexpr bool weighted = weights;
};

// body(Branches{}) for those of a block, the groups having two.
template <typename Body>
inline __attribute__((always_inline)) void with_both_or_first(const Groups& g, const WindowBlock& block,
                                                              const Body& body) {
    g.branches_of(block) == 1 ? body(Branches<1, true>{}) : body(Branches<2, true>{});
}

// The same for one or two.
template <typename Body>
inline __attribute__((always_inline)) void with_branches(const Groups& g, const WindowBlock& block, const Body& body) {
    g.branches == 1 ? body(Branches<1, false>{}) : with_both_or_first(g, block, body);
}

// Weights of a tile's tokens for each branch, or 1. A tile lies in one window of each branch, so its weights are a
// rectangle of a (p, p) map.
template <int branches, bool weighted>
struct TileWeights {
    const float* first[branches];
    int64_t row;

    Vec at(int branch, int64_t y, int64_t x) const { return broadcast(weighted ? first[branch][y * row + x] : 1.0f); }
};

// The squares of the token weights.
template <typename B>
inline auto token_squares(const Groups& g, int64_t head, const Tile& tile) {
    TileWeights<B::count, B::weighted> weights{{}, g.vertical.window};
    for (int branch = 0; branch < B::count && B::weighted; ++branch) {
        weights.first[branch] = g.weights(g.token_squares[branch], branch, head, tile);
    }
    return weights;
}

// The weights of the branches' outputs, both laid out by the unshifted windows.
template <typename B>
inline auto merge_weights(const Groups& g, int64_t head, const Tile& tile) {
    TileWeights<B::count, B::count == 2> weights{{}, g.vertical.window};
    for (int branch = 0; branch < B::count && B::count == 2; ++branch) {
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

// Channels c to c + kLanes of a pixel; zeros from `channels` on.
template <typename T>
inline Vec load_channels(const T* pixel, int64_t c, int64_t channels) {
    if (c + kLanes <= channels) {
        return load(pixel + c);
    }
    return c < channels ? load(pixel + c, channels - c) : Vec{};
}

// What tiles are summed up to, of one block and head; the parts of a slot, see channel_attention_kernel.h.
struct GramSums {
    float* matrices;  // [branches][depth][depth]
    float* norms;     // [branches][2][depth], squared, of q and k
    float* factors;   // [2][depth]
};

// q and k of a tile of tokens, w^2 k of all branches side by side.
template <typename Unit, typename B>
struct GramTile {
    static constexpr int branches = B::count;
    using Weights = TileWeights<B::count, B::weighted>;

    const Unit& unit;
    int64_t channels, depth;
    float* q;        // [kTileTokens][depth]
    float* k;        // [kTileTokens][branches][depth]
    float* sums;     // [branches][depth][depth]
    float* squares;  // [branches][2][depth], of q and k
    float* factors;  // [2][depth]
    float* room;     // for both operands of the product

    GramTile(const Unit& unit, const Groups& g, float* scratch)
        : unit(unit),
          channels(g.head_channels),
          depth(g.depth),
          q(scratch),
          k(q + kTileTokens * depth),
          sums(k + kTileTokens * branches * depth),
          squares(sums + branches * depth * depth),
          factors(squares + 2 * branches * depth),
          room(factors + 2 * depth) {}

    // Channels c to c + kLanes of the token (y, x) of a tile; adds the squares of w q and of w k.
    inline __attribute__((always_inline)) void put_q(const Tile& tile, int64_t y, int64_t x, int64_t c, Vec value,
                                                     const Weights& w, Vec (&sum)[branches]) const {
        store(q + (y * tile.columns + x) * depth + c, value);
        const Vec square = value * value;
        for (int branch = 0; branch < branches; ++branch) {
            sum[branch] = fma(w.at(branch, y, x), square, sum[branch]);
        }
    }
    inline __attribute__((always_inline)) void put_k(const Tile& tile, int64_t y, int64_t x, int64_t c, Vec value,
                                                     const Weights& w, Vec (&sum)[branches]) const {
        float* target = k + (y * tile.columns + x) * branches * depth + c;
        for (int branch = 0; branch < branches; ++branch) {
            const Vec weighted = w.at(branch, y, x) * value;
            store(target + branch * depth, weighted);
            sum[branch] = fma(weighted, value, sum[branch]);
        }
    }
    // Their sums over the tile, of q (0) or k (1).
    inline __attribute__((always_inline)) void put_squares(int64_t of_k, int64_t c, const Vec (&sum)[branches]) const {
        for (int branch = 0; branch < branches; ++branch) {
            store(squares + (2 * branch + of_k) * depth + c, sum[branch]);
        }
    }

    // Adds the tile to a slot, or begins it. One sum over all of a large block would lose digits. read_k(rows) puts k
    // without weights to [tokens][depth], if it is needed again.
    template <typename ReadK>
    void add(const Tile& tile, const Weights& w, GramSums slot, bool begin, const ReadK& read_k) const {
        for (int64_t i = 0; i < 2 * depth && begin; i += kLanes) {
            store(slot.factors + i, broadcast(1.0f));
        }
        if (!plain(slot.factors)) {
            float* rows = k + (branches - 1) * kTileTokens * depth;  // at the end: they make room as they are weighted
            read_k(rows);
            scale(tile, w, rows, slot.factors);
            add_scaled(tile.tokens(), slot, begin);
            return;
        }
        multiply(tile.tokens(), slot.matrices, begin);
        for (int64_t i = 0; i < 2 * branches * depth; i += kLanes) {
            add_to(slot.norms + i, load(squares + i), begin);
        }
    }

    // Adds the products alone.
    void multiply(int64_t tokens, float* matrices, bool begin) const {
        const Matrix weighted{k, tokens, branches * depth, branches * depth}, values{q, tokens, depth, depth};
        const Matrix target{begin ? matrices : sums, branches * depth, depth, depth};
        unit.product(unit.left_transposed(weighted, room),
                     unit.right(values, room + room_of(kTileTokens, branches * depth)), target, Accumulate::no);
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
    void scale(const Tile& tile, const Weights& w, const float* rows, const float* slot_factors) const {
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
    void add_scaled(int64_t tokens, GramSums slot, bool begin) const {
        multiply(tokens, begin ? slot.matrices : sums, true);
        float *const ours = q, *const theirs = ours + 2 * depth;  // what either is multiplied by; q is done with
        for (int64_t i = 0; i < 2 * depth; i += kLanes) {
            const Vec factor = load(factors + i), of_slot = load(slot.factors + i);
            IntVec none = IntVec{} - 1;
            for (int branch = 0; branch < branches && !begin; ++branch) {
                none &= load(slot.norms + 2 * branch * depth + i) == Vec{};
            }
            const Vec common = none ? factor : min(factor, of_slot);
            store(ours + i, common / factor);
            store(theirs + i, none ? broadcast(1.0f) : common / of_slot);
            store(slot.factors + i, common);
            for (int branch = 0; branch < branches; ++branch) {
                float* norm = slot.norms + 2 * branch * depth + i;
                const Vec a = load(ours + i), b = load(theirs + i);
                const Vec square = load(squares + 2 * branch * depth + i) * a * a;
                store(norm, begin ? square : load(norm) * b * b + square);
            }
        }
        for (int64_t row = 0; row < branches * depth && !begin; ++row) {
            const int64_t j = depth + row % depth;
            for (int64_t i = 0; i < depth; i += kLanes) {
                float* sum = slot.matrices + row * depth + i;
                store(sum, load(sum) * theirs[j] * load(theirs + i) +
                               load(sums + row * depth + i) * ours[j] * load(ours + i));
            }
        }
    }
};

// body(T{}, unit, Branches{}, block, index) for the heads of blocks, begin <= index < end being block * heads + head,
// of the kernels' parameters p.
template <typename Params, typename Body>
inline void for_blocks(const Params& p, int64_t begin, int64_t end, const Body& body) {
    const Groups& g = p.groups;
    with_types(p.dtype, p.brgemm, [&](auto type, const auto& unit) {
        for (int64_t index = begin; index < end; ++index) {
            const WindowBlock block = g.block(index / g.heads);
            with_branches(g, block, [&](auto branches) { body(type, unit, branches, block, index); });
        }
    });
}

}  // namespace
}  // namespace ipt_fast::cpu
