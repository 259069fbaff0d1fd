// Backward of channel attention at the level it is compiled for; see gram.h and window_blocks.h.
//
// With G = sum of w^2 q k^T, S = G / (|q| |k|), A = softmax(scale S) and F = A v, the gradient of A is the Gram matrix
// of merge * grad and v. Three passes, as in the forward: both Gram matrices of every block and head (reads q, k, v and
// grad once, for both branches); all that is d x d, for every window; and the gradients, products of each pixel with
// three matrices of each branch (reads q, k, v and grad again, writes the gradients of q, k and v).
// Bytes a pixel: 11 * C * sizeof(T) and the slots. FLOP a pixel: 10 * C * d for each branch.
#include "attend_backward.h"
#include "channel_attention_kernel.h"
#include "gram.h"
#include "rows.h"

namespace ipt_fast::cpu {
namespace {

// The tokens of a tile of one head, as a map has them.
template <typename T>
struct Tokens {
    const T* first;
    int64_t pixel, row;

    Tokens(const Groups& g, const Pixels& map, const WindowBlock& block, const Tile& tile, int64_t head)
        : pixel(map.stride * g.dilation), row(map.stride * g.row()) {
        const int64_t index = g.pixel(block.image, tile.y, tile.x);
        first = static_cast<const T*>(map.data) + index * map.stride + head * g.head_channels;
    }
    const T* at(int64_t y, int64_t x) const { return first + y * row + x * pixel; }
};

template <typename T>
inline void load_tile(const Tokens<T>& tokens, const Tile& tile, const Groups& g, float* rows) {
    const Matrix all{rows, tile.tokens(), g.depth, g.depth};
    for (int64_t y = 0; y < tile.rows; ++y) {
        load_rows(Matrix{tokens.at(y, 0), tile.columns, g.head_channels, tokens.pixel},
                  all.slice(y * tile.columns, tile.columns));
    }
}

// ---- Gram matrices of blocks ----------------------------------------------------------------------------------------

// One map of a tile, out[token][copy][depth]: with `scaled` a copy times the weight for each branch, else one as it is.
// Puts the sums of weight * value^2 over the tokens to `squares` (nullptr: none), 2 * depth apart.
template <bool scaled, int branches, typename T, typename Weights>
inline void stage_tokens(const Tokens<T>& tokens, const Tile& tile, int64_t channels, int64_t depth,
                         const Weights& weights, float* out, float* squares) {
    const auto channel = [&](int64_t c, auto full) __attribute__((always_inline)) {
        Vec sums[branches]{};
        float* target = out + c;
        for (int64_t y = 0; y < tile.rows; ++y) {
            const T* const row = tokens.at(y, 0);
            for (int64_t x = 0, columns = tile.columns, pixel = tokens.pixel; x < columns; ++x) {
                const T* const in = row + x * pixel;
                const Vec value = decltype(full)::value ? load(in + c) : load_channels(in, c, channels);
                for (int branch = 0; branch < branches; ++branch) {
                    const Vec weighted = weights.at(branch, y, x) * value;
                    sums[branch] = fma(weighted, value, sums[branch]);
                    if (scaled) {
                        store(target + branch * depth, weighted);
                    }
                }
                if (!scaled) {
                    store(target, value);
                }
                target += (scaled ? branches : 1) * depth;
            }
        }
        for (int branch = 0; branch < branches && squares; ++branch) {
            store(squares + 2 * branch * depth + c, sums[branch]);
        }
    };
    for (int64_t c = 0; c < depth; c += kLanes) {
        c + kLanes <= channels ? channel(c, Constant<1>{}) : channel(c, Constant<0>{});
    }
}

// Of one head of a block; index counts blocks and heads.
template <typename T, typename B, typename Unit>
void gram_block(const ChannelAttentionBackwardParams& p, const Unit& unit, const WindowBlock& block, int64_t index,
                float* scratch) {
    const Groups& g = p.groups;
    const int64_t depth = g.depth, head = index % g.heads;
    const GramTile<Unit, B> staged(unit, g, scratch);
    float* const slot = p.slot(index / g.heads, head);
    float* const of_values = slot + g.branches * depth * depth;
    float* const norms = of_values + g.branches * depth * depth;
    for (int64_t t = 0; t < block.tiles(); ++t) {
        const Tile tile = block.tile(t);
        const auto weights = token_squares<B>(g, head, tile);
        const auto merge = merge_weights<B>(g, head, tile);
        const auto stage = [&](auto scaled, const Pixels& map, const auto& with, float* out, float* squares) {
            const Tokens<T> tokens(g, map, block, tile, head);
            stage_tokens<decltype(scaled)::value, B::count>(tokens, tile, g.head_channels, depth, with, out, squares);
        };
        stage(Constant<0>{}, p.q, weights, staged.q, staged.squares);
        stage(Constant<1>{}, p.k, weights, staged.k, staged.squares + depth);
        staged.add(tile, weights, {slot, norms, p.factors(slot)}, t == 0,
                   [&](float* rows) { load_tile(Tokens<T>(g, p.k, block, tile, head), tile, g, rows); });
        stage(Constant<0>{}, p.grad, merge, staged.q, nullptr);
        stage(Constant<1>{}, p.v, merge, staged.k, nullptr);
        staged.multiply(tile.tokens(), of_values, t == 0);
    }
}

// ---- matrices of windows --------------------------------------------------------------------------------------------

void attend(const ChannelAttentionBackwardParams& p, int64_t begin, int64_t end, float* scratch) {
    for (int64_t index = begin; index < end; ++index) {
        const HeadWindow window(p.groups, index);
        p.grad_scale[index] = 0;
        if (!p.groups.unused(window.branch, window.y, window.x)) {
            WindowBackward backward(p, window, reinterpret_cast<double*>(scratch));
            backward.run();
            p.grad_scale[index] = backward.grad_scale;
        }
    }
}

// ---- gradients of pixels --------------------------------------------------------------------------------------------

// The window of a pixel along one axis.
inline int64_t window_of(const Axis& axis, int branch, int64_t pixel) {
    const int64_t all = axis.windows() * axis.window;
    return (pixel + all - branch * axis.part) % all / axis.window;
}

// A gradient is the sum over the branches of the token's weight times a term. A term is made of `product`, the
// channel's value of the staged rows times a matrix of the branch (ApplyTile::multiply), and of the values staged in q
// and k, at place `at` of them, c being the channel. What it adds to `sum`, summed over the channels, is the gradient
// of the weight and goes to token map kTokenMap + branch; -1: nowhere.

// dG k + slope q; the gradient of w is w times the token sum.
template <int branches>
struct TermOfQ {
    static constexpr int kTokenMap = 0;

    const float *q, *k;
    const float *q_slopes[branches], *k_slopes[branches];

    inline __attribute__((always_inline)) Vec operator()(int branch, int64_t at, int64_t c, Vec product,
                                                         Vec& sum) const {
        const Vec q_value = load(q + at), k_value = load(k + at), k_square = k_value * k_value;
        const Vec gradient = fma(load(q_slopes[branch] + c), q_value, product);
        sum = fma(q_value, gradient + product, sum);
        sum = fma(load(k_slopes[branch] + c), k_square, sum);
        return gradient;
    }
};

// dG^T q + slope k
template <int branches>
struct TermOfK {
    static constexpr int kTokenMap = -1;

    const float* k;
    const float* k_slopes[branches];

    inline __attribute__((always_inline)) Vec operator()(int branch, int64_t at, int64_t c, Vec product, Vec&) const {
        return fma(load(k_slopes[branch] + c), load(k + at), product);
    }
};

// A^T grad; the gradient of the merge weight is v A^T grad.
struct TermOfV {
    static constexpr int kTokenMap = 2;

    const float* v;

    inline __attribute__((always_inline)) Vec operator()(int, int64_t at, int64_t, Vec product, Vec& sum) const {
        sum = fma(load(v + at), product, sum);
        return product;
    }
};

// What the gradients of a block's values are computed with: `matrices` of ChannelAttentionBackwardParams of the windows
// that it lies in, one of each branch, or where windows overlap up to four of the only branch.
template <int branches>
struct BlockMatrices {
    static constexpr int kMost = branches == 1 ? 4 : 2;

    int windows;  // of a branch
    const float* of[kMost];
    const float* units;             // of q, then of k, in which they and their gradients are; nullptr: 1
    const float* slopes[branches];  // of q, then of k, sums over the branch's windows
};

// One tile of one head. Rows of scratch have `depth` floats for each token, products one row for each branch.
template <typename T, typename B, typename Unit>
struct ApplyTile {
    static constexpr int branches = B::count;

    const ChannelAttentionBackwardParams& p;
    const Unit& unit;
    const Groups& g;
    const WindowBlock& block;
    const Tile& tile;
    int64_t head;
    const BlockMatrices<branches>& matrices;
    float *q, *k, *products, *room;

    void run() const {
        const auto squares = token_squares<B>(g, head, tile);
        const auto merge = merge_weights<B>(g, head, tile);
        const float* const q_units = matrices.units;
        const float* const k_units = q_units ? q_units + g.depth : nullptr;
        TermOfQ<branches> of_q{q, k, {}, {}};
        TermOfK<branches> of_k{k, {}};
        for (int branch = 0; branch < branches; ++branch) {
            of_q.q_slopes[branch] = matrices.slopes[branch];
            of_q.k_slopes[branch] = of_k.k_slopes[branch] = matrices.slopes[branch] + g.depth;
        }
        stage(p.q, q, q_units);
        stage(p.k, k, k_units);
        multiply(k, 0);
        gradient(of_q, squares, q_units, p.grad_q);
        multiply(q, 1);
        gradient(of_k, squares, k_units, p.grad_k);
        stage(p.grad, q);
        multiply(q, 2);
        stage(p.v, k);
        gradient(TermOfV{k}, merge, nullptr, p.grad_v);
    }

  private:
    void stage(const Pixels& map, float* out, const float* factors = nullptr) const {
        load_tile(Tokens<T>(g, map, block, tile, head), tile, g, out);
        for (int64_t i = 0; i < tile.tokens() * g.depth && factors; i += kLanes) {
            store(out + i, load(out + i) * load(factors + i % g.depth));
        }
    }

    // products = rows times matrix `which` of every branch, summed over its windows. Sums of the matrices would serve,
    // too, but products that round their factors would round them again.
    void multiply(const float* rows, int64_t which) const {
        for (int i = 0; i < branches * matrices.windows; ++i) {
            const int branch = i / matrices.windows;
            const Matrix left{rows, tile.tokens(), g.head_channels, g.depth};
            const Matrix right{matrices.of[i] + which * g.depth * g.depth, g.head_channels, g.depth, g.depth};
            const Matrix target{products + branch * g.depth, tile.tokens(), g.depth, branches * g.depth};
            unit.product(unit.left(unit.rows(left, room)), unit.right(right, room + kTileTokens * g.depth), target,
                         i % matrices.windows == 0 ? Accumulate::no : Accumulate::yes);
        }
    }

    // Writes one gradient of the tile, times its channels' units (nullptr: 1), and the token sums of what has weights.
    template <typename Term, bool weighted>
    inline __attribute__((always_inline)) void gradient(const Term& term,
                                                        const TileWeights<branches, weighted>& weights,
                                                        const float* unit, void* out) const {
        const float* const all_products = products;
        const int64_t depth = g.depth, channels = g.head_channels;
        for (int64_t y = 0, token = 0; y < tile.rows; ++y) {
            const int64_t pixel = g.pixel(block.image, tile.y + y, tile.x), step = g.dilation * p.grad_pixel;
            T* target = static_cast<T*>(out) + pixel * p.grad_pixel + head * g.head_channels;
            for (int64_t first = 0, columns = tile.columns; first < columns; first += kLanes) {
                const int64_t count = columns - first < kLanes ? columns - first : kLanes;
                Vec sums[branches][kLanes];
                for (int64_t i = 0; i < count; ++i, ++token, target += step) {
                    Vec weight[branches], sum[branches]{};
                    for (int branch = 0; branch < branches; ++branch) {
                        weight[branch] = weights.at(branch, y, first + i);
                    }
                    const float* const of_token = all_products + token * branches * depth;
                    for_vectors(channels, [&](int64_t c, int64_t n) __attribute__((always_inline)) {
                        Vec total{};
                        for (int branch = 0; branch < branches; ++branch) {
                            const Vec product = load(of_token + branch * depth + c);
                            const Vec part = term(branch, token * depth + c, c, product, sum[branch]);
                            total = fma(weight[branch], part, total);
                        }
                        store(target + c, unit ? total * load(unit + c) : total, n);
                    });
                    for (int branch = 0; branch < branches; ++branch) {
                        sums[branch][i] = sum[branch];
                    }
                }
                if constexpr (weighted && Term::kTokenMap >= 0) {
                    for (int branch = 0; branch < branches; ++branch) {
                        for (int64_t i = count; i < kLanes; ++i) {
                            sums[branch][i] = Vec{};
                        }
                        float* const row =
                            p.token_row(Term::kTokenMap + branch, head, block.image, tile.y + y, tile.x + first);
                        store(row, sum_each(sums[branch]), count);
                    }
                }
            }
        }
    }
};

// Fills in `matrices` what `of` and `windows` tell. Where windows have units, or share the block, it holds copies: in
// common units, the larger ones, so that no value of the block is above 1; of the attention, the share.
template <int branches>
void prepare(const ChannelAttentionBackwardParams& p, float share, BlockMatrices<branches>& matrices, float* scratch) {
    const int64_t depth = p.groups.depth, matrix = depth * depth, size = p.matrices_size();
    const int count = branches * matrices.windows;
    float *const units = scratch, *const factors = units + 2 * depth, *const slopes = factors + 2 * depth;
    float* const copies = slopes + 2 * depth;
    bool ones = true;
    for (int i = 0; i < count; ++i) {
        ones = ones && all_ones(p.units(matrices.of[i]), 2 * depth);
    }
    matrices.units = ones ? nullptr : units;
    for (int64_t i = 0; i < 2 * depth; i += kLanes) {
        Vec most = load(p.units(matrices.of[0]) + i);
        for (int n = 1; n < count; ++n) {
            most = max(most, load(p.units(matrices.of[n]) + i));
        }
        store(units + i, most);
    }
    for (int n = 0; n < count && (!ones || share != 1); ++n) {
        const float* const in = matrices.of[n];
        float* const out = copies + n * size;
        for (int64_t i = 0; i < 2 * depth; i += kLanes) {
            const Vec factor = load(p.units(in) + i) / load(units + i);
            store(factors + i, factor);
            store(out + 3 * matrix + i, load(in + 3 * matrix + i) * factor * factor);
        }
        const float *const of_q = factors, *const of_k = factors + depth;
        for (int64_t i = 0; i < matrix; i += kLanes) {
            const int64_t row = i / depth, column = i % depth;
            store(out + i, load(in + i) * of_k[row] * load(of_q + column));
            store(out + matrix + i, load(in + matrix + i) * of_q[row] * load(of_k + column));
            store(out + 2 * matrix + i, load(in + 2 * matrix + i) * share);
        }
        matrices.of[n] = out;
    }
    for (int branch = 0; branch < branches; ++branch) {
        matrices.slopes[branch] = matrices.of[branch * matrices.windows] + 3 * matrix;
    }
    if (matrices.windows > 1) {
        for (int64_t i = 0; i < 2 * depth; i += kLanes) {
            Vec sum{};
            for (int n = 0; n < count; ++n) {
                sum += load(matrices.of[n] + 3 * matrix + i);
            }
            store(slopes + i, sum);
        }
        matrices.slopes[0] = slopes;
    }
}

// Of one head of a block; index counts blocks and heads.
template <typename T, typename B, typename Unit>
void apply_block(const ChannelAttentionBackwardParams& p, const Unit& unit, const WindowBlock& block, int64_t index,
                 float* scratch) {
    const Groups& g = p.groups;
    float *const q = scratch, *const k = q + kTileTokens * g.depth, *const products = k + kTileTokens * g.depth;
    float* const room = products + B::count * kTileTokens * g.depth;
    float* const moved = room + kTileTokens * g.depth + g.depth * g.depth;
    const int64_t head = index % g.heads;
    BlockMatrices<B::count> matrices{};
    float share = 1;
    if constexpr (B::count == 1) {
        for_windows_over(g, block,
                         [&](int64_t window) { matrices.of[matrices.windows++] = p.matrices_of(window, head, 0); });
        share = share_of_window(g, block);
    } else {
        matrices.windows = 1;
        for (int branch = 0; branch < B::count; ++branch) {
            const int64_t y = window_of(g.vertical, branch, block.y), x = window_of(g.horizontal, branch, block.x);
            matrices.of[branch] =
                p.matrices_of((block.image * g.vertical.windows() + y) * g.horizontal.windows() + x, head, branch);
        }
    }
    prepare(p, share, matrices, moved);
    for (int64_t t = 0; t < block.tiles(); ++t) {
        const Tile tile = block.tile(t);
        ApplyTile<T, B, Unit>{p, unit, g, block, tile, head, matrices, q, k, products, room}.run();
    }
}

void gram_any(const ChannelAttentionBackwardParams& p, int64_t begin, int64_t end, float* scratch) {
    for_blocks(p, begin, end, [&](auto type, const auto& unit, auto branches, const auto& block, int64_t index) {
        gram_block<decltype(type), decltype(branches)>(p, unit, block, index, scratch);
    });
}

void apply_any(const ChannelAttentionBackwardParams& p, int64_t begin, int64_t end, float* scratch) {
    for_blocks(p, begin, end, [&](auto type, const auto& unit, auto branches, const auto& block, int64_t index) {
        apply_block<decltype(type), decltype(branches)>(p, unit, block, index, scratch);
    });
}

}  // namespace

constinit const ChannelAttentionBackwardKernels ChannelAttentionBackwardKernels::IPT_FAST_LEVEL = {
    cpu::gram_any, cpu::attend, cpu::apply_any};

}  // namespace ipt_fast::cpu
