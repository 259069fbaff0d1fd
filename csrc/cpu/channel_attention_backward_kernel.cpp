// Backward of channel attention for the translation unit's instruction set; see gram.h and windows.h.
//
// With G = sum of w^2 q k^T, S = G / (|q| |k|), A = softmax(scale S) and F = A v, the gradient of A is the Gram matrix
// of merge * grad and v. Three passes, as in the forward: both Gram matrices of every block and head (reads q, k, v and
// grad once, for both branches); all that is d x d, for every window; and the gradients, products of each pixel with
// three matrices of each branch (reads q, k, v and grad again, writes the gradients of q, k and v).
// Bytes a pixel: 11 * C * sizeof(T) and the slots. FLOP a pixel: 10 * C * d for each branch.
#include "gram.h"
#include "ipt_fast/channel_attention_backward.h"
#include "rows.h"

namespace ipt_fast {
namespace {

using Params = ChannelAttentionBackwardParams;

// The merge weights of a tile's tokens for each branch, or 1 where there is only one branch; see TokenWeights.
template <int branches>
struct MergeWeights {
    const float* first[branches];
    int64_t row;

    MergeWeights(const Groups& g, int64_t head, const Tile& tile) : row(g.vertical.window) {
        for (int branch = 0; branch < branches && branches == 2; ++branch) {
            first[branch] = g.weights(g.merge[branch], 0, head, tile);  // both are laid out by the unshifted windows
        }
    }
    Vec at(int branch, int64_t y, int64_t x) const {
        return broadcast(branches == 1 ? 1.0f : first[branch][y * row + x]);
    }
};

// The tokens of a tile of one head, as a map has them.
template <typename T>
struct Tokens {
    const T* first;
    int64_t pixel, row;

    Tokens(const Groups& g, const Pixels& map, const Block& block, const Tile& tile, int64_t head)
        : pixel(map.stride), row(map.stride * g.horizontal.size) {
        const int64_t index = (block.image * g.vertical.size + tile.y) * g.horizontal.size + tile.x;
        first = static_cast<const T*>(map.data) + index * pixel + head * g.head_channels;
    }
    const T* at(int64_t y, int64_t x) const { return first + y * row + x * pixel; }

    // Asks for the tile ahead of its use: rows of a tile are too short for the processor to foresee them.
    template <bool write>
    void prefetch(const Tile& tile, int64_t channels) const {
        constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
        for (int64_t y = 0; y < tile.rows; ++y) {
            for (int64_t x = 0; x < tile.columns; ++x) {
                for (int64_t c = 0; c < channels; c += kLine) {
                    __builtin_prefetch(at(y, x) + c, write, 2);
                }
            }
        }
    }
};

// The tile after tile t of a block, itself after the last.
inline Tile next_tile(const Block& block, int64_t t) { return block.tile(t + 1 < block.tiles() ? t + 1 : t); }

// ---- Gram matrices of blocks ----------------------------------------------------------------------------------------

template <typename T, int branches>
void gram(const Params& p, int64_t begin, int64_t end, float* scratch) {
    const Groups& g = p.groups;
    const int64_t depth = g.depth;
    const GramTile<branches> staged(depth, scratch);
    for (int64_t index = begin; index < end; ++index) {
        const Block block(g.vertical, g.horizontal, index / g.heads);
        const int64_t head = index % g.heads;
        float* const slot = p.slot(index / g.heads, head);
        float* const norms = slot + 2 * branches * depth * depth;
        for (int64_t t = 0; t < block.tiles(); ++t) {
            const Tile tile = block.tile(t);
            const TokenWeights<branches> weights(g, head, tile);
            const MergeWeights<branches> merge(g, head, tile);
            // put(y, x, channel, value, squares) for all of one map; squares are sums over the tokens of a channel
            const auto stage = [&](const Pixels& map, const auto& put, float* norm) {
                const Tokens<T> tokens(g, map, block, tile, head);
                for (int64_t c = 0; c < depth; c += kLanes) {
                    Vec squares[branches]{};
                    for (int64_t y = 0; y < tile.rows; ++y) {
                        for (int64_t x = 0; x < tile.columns; ++x) {
                            put(y, x, c, load_channels(tokens.at(y, x), c, g.head_channels), squares);
                        }
                    }
                    for (int branch = 0; branch < branches && norm; ++branch) {
                        add_to(norm + 2 * branch * depth + c, squares[branch], t == 0);
                    }
                }
            };
            const Tile next = next_tile(block, t);
            Tokens<T>(g, p.q, block, next, head).template prefetch<false>(next, g.head_channels);
            Tokens<T>(g, p.k, block, next, head).template prefetch<false>(next, g.head_channels);
            Tokens<T>(g, p.v, block, tile, head).template prefetch<false>(tile, g.head_channels);
            Tokens<T>(g, p.grad, block, tile, head).template prefetch<false>(tile, g.head_channels);
            stage(
                p.q,
                [&](int64_t y, int64_t x, int64_t c, Vec value, Vec(&squares)[branches]) {
                    staged.put_q(tile, y, x, c, value, weights, squares);
                },
                norms);
            stage(
                p.k,
                [&](int64_t y, int64_t x, int64_t c, Vec value, Vec(&squares)[branches]) {
                    staged.put_k(tile, y, x, c, value, weights, squares);
                },
                norms + depth);
            staged.multiply(tile.tokens(), slot, t == 0);
            stage(
                p.grad,
                [&](int64_t y, int64_t x, int64_t c, Vec value, Vec*) {
                    store(staged.q + (y * tile.columns + x) * depth + c, value);
                },
                nullptr);
            stage(
                p.v,
                [&](int64_t y, int64_t x, int64_t c, Vec value, Vec*) {
                    for (int branch = 0; branch < branches; ++branch) {
                        store(staged.k + ((y * tile.columns + x) * branches + branch) * depth + c,
                              merge.at(branch, y, x) * value);
                    }
                },
                nullptr);
            staged.multiply(tile.tokens(), slot + branches * depth * depth, t == 0);
        }
    }
}

// ---- matrices of windows --------------------------------------------------------------------------------------------

// out[j][i] = in[i][j]
inline void transpose_matrix(const float* in, int64_t depth, float* out) {
    for (int64_t i = 0; i < depth; i += kLanes) {
        for (int64_t j = 0; j < depth; j += kLanes) {
            Vec rows[kLanes];
            for (int k = 0; k < kLanes; ++k) {
                rows[k] = load(in + (i + k) * depth + j);
            }
            transpose(rows);
            for (int k = 0; k < kLanes; ++k) {
                store(out + (j + k) * depth + i, rows[k]);
            }
        }
    }
}

// Everything of one window, head and branch that is d x d, in fp64 because the gradients of normalised vectors are
// differences of nearly equal terms. Rows of a matrix are k's (v's) channels, columns q's (grad's).
void attend_window(const Params& p, int64_t image, int64_t window_y, int64_t window_x, int64_t head, int branch,
                   double* scratch, float* out, double* grad_scale) {
    const Groups& g = p.groups;
    const int64_t depth = g.depth, channels = g.head_channels, matrix = depth * depth;
    double *const scores = scratch, *const grads = scores + matrix;  // both Gram matrices at first
    double *const q = grads + matrix, *const k = q + depth;          // squared norms at first
    memset(scratch, 0, (2 * matrix + 2 * depth) * sizeof(double));
    int64_t tokens = 0;
    for (int64_t i = 0; i < g.vertical.parts; ++i) {
        for (int64_t j = 0; j < g.horizontal.parts; ++j) {
            const int64_t y = g.vertical.block_of(branch, window_y, i);
            const int64_t x = g.horizontal.block_of(branch, window_x, j);
            if (y >= g.vertical.blocks() || x >= g.horizontal.blocks()) {
                continue;
            }
            const int64_t index = (image * g.vertical.blocks() + y) * g.horizontal.blocks() + x;
            const Block block(g.vertical, g.horizontal, index);
            tokens += block.rows * block.columns;
            const float* const slot = p.slot(index, head);
            const auto add = [](const float* from, int64_t count, double* to) {
                for (int64_t n = 0; n < count; ++n) {
                    to[n] += from[n];
                }
            };
            add(slot + branch * matrix, matrix, scores);
            add(slot + (g.branches + branch) * matrix, matrix, grads);
            add(slot + 2 * (g.branches * matrix + branch * depth), 2 * depth, q);
        }
    }
    double *const q_slopes = k + depth, *const k_slopes = q_slopes + depth;
    for (int64_t i = 0; i < 2 * depth; ++i) {  // of q, then of k
        const double norm = __builtin_sqrt(q[i]);
        q[i] = 1.0 / (norm < 1e-12 ? 1e-12 : norm);
        q_slopes[i] = norm < 1e-12 ? 0.0 : -q[i] * q[i];
    }
    double *const most = k_slopes + depth, *const sums = most + depth, *const means = sums + depth;
    double *const slopes = means + depth, *const of_scales = slopes + depth, *const attention = of_scales + depth;
    memset(sums, 0, 4 * depth * sizeof(double));
    const double scale = g.scale[head];
    for (int64_t j = 0; j < channels; ++j) {
        double* const score = scores + j * depth;
        for (int64_t i = 0; i < depth; ++i) {
            score[i] *= q[i] * k[j];
            const double logit = score[i] * scale;
            most[i] = j == 0 || logit > most[i] ? logit : most[i];
        }
    }
    for (int64_t j = 0; j < channels; ++j) {
        float* const logits = out;  // not yet in use
        for (int64_t i = 0; i < depth; ++i) {
            logits[i] = static_cast<float>(scores[j * depth + i] * scale - most[i]);
        }
        for (int64_t i = 0; i < depth; i += kLanes) {
            store(logits + i, exp(load(logits + i)));
        }
        for (int64_t i = 0; i < depth; ++i) {
            attention[j * depth + i] = logits[i];
            sums[i] += logits[i];
            means[i] += grads[j * depth + i] * logits[i];
        }
    }
    for (int64_t i = 0; i < depth; ++i) {
        sums[i] = i < channels ? 1.0 / sums[i] : 0.0;
        means[i] *= sums[i];
    }
    float *const of_gram = out, *const of_values = out + matrix;  // the latter is moved at the end
    memset(of_gram + channels * depth, 0, (depth - channels) * depth * sizeof(float));
    memset(of_values + channels * depth, 0, (depth - channels) * depth * sizeof(float));
    const double through = tokens == 1 ? 0.0 : scale;  // a channel of one token is normalised to its sign
    for (int64_t j = 0; j < channels; ++j) {
        double row[kChannelPad]{};
        for (int64_t first = 0; first < depth; first += kChannelPad) {
            for (int64_t lane = 0; lane < kChannelPad; ++lane) {
                const int64_t i = first + lane;
                const double a = attention[j * depth + i] * sums[i], score = scores[j * depth + i];
                const double of_logit = a * (grads[j * depth + i] - means[i]), of_score = of_logit * through;
                of_scales[i] += of_logit * score;
                slopes[i] += of_score * score;
                row[lane] += of_score * score;
                of_gram[j * depth + i] = static_cast<float>(of_score * q[i] * k[j]);
                of_values[j * depth + i] = static_cast<float>(a);
            }
        }
        double slope = 0;
        for (int64_t lane = 0; lane < kChannelPad; ++lane) {
            slope += row[lane];
        }
        k_slopes[j] *= slope;
    }
    *grad_scale = 0;
    for (int64_t i = 0; i < depth; ++i) {
        *grad_scale += of_scales[i];
        out[3 * matrix + i] = static_cast<float>(q_slopes[i] * slopes[i]);
        out[3 * matrix + depth + i] = i < channels ? static_cast<float>(k_slopes[i]) : 0.0f;
    }
    transpose_matrix(of_values, depth, out + 2 * matrix);
    transpose_matrix(of_gram, depth, out + matrix);
}

void attend(const Params& p, int64_t begin, int64_t end, float* scratch) {
    const Groups& g = p.groups;
    const int64_t across = g.horizontal.windows(), down = g.vertical.windows();
    for (int64_t index = begin; index < end; ++index) {
        const int branch = static_cast<int>(index % g.branches);
        const int64_t head = index / g.branches % g.heads, window = index / g.branches / g.heads;
        attend_window(p, window / across / down, window / across % down, window % across, head, branch,
                      reinterpret_cast<double*>(scratch), p.matrices_of(window, head, branch), p.grad_scale + index);
    }
}

// ---- gradients of pixels --------------------------------------------------------------------------------------------

// The window of a pixel along one axis.
inline int64_t window_of(const Axis& axis, int branch, int64_t pixel) {
    const int64_t all = axis.windows() * axis.window;
    return (pixel + all - branch * axis.part) % all / axis.window;
}

// One tile of one head. Rows of scratch have `depth` floats for each token, products one row for each branch.
template <typename T, int branches>
struct ApplyTile {
    const Params& p;
    const Groups& g;
    const Block& block;
    const Tile& tile;
    int64_t head;
    const float* const* matrices;  // of the branches
    float *q, *k, *products;

    void stage(const Pixels& map, float* out) const {
        const Tokens<T> tokens(g, map, block, tile, head);
        for (int64_t y = 0; y < tile.rows; ++y) {
            load_rows(tokens.at(y, 0), tokens.pixel, tile.columns, g.head_channels, out + y * tile.columns * g.depth,
                      g.depth);
        }
    }

    // products = rows times matrix `which` of every branch
    void multiply(const float* rows, int64_t which) const {
        for (int branch = 0; branch < branches; ++branch) {
            product(tile.tokens(), g.depth, g.head_channels, rows, g.depth,
                    matrices[branch] + which * g.depth * g.depth, g.depth, products + branch * g.depth,
                    branches * g.depth, false);
        }
    }

    const float* slopes(int branch, int64_t of_k) const { return matrices[branch] + g.depth * (3 * g.depth + of_k); }

    // Writes the gradients that body(token, y, x, out, sums) computes for the tokens (y, x) of the tile; adds for every
    // branch a sum over the channels to token map first_map + branch.
    template <typename Body>
    void write(void* out, int64_t first_map, const Body& body) const {
        for (int64_t y = 0; y < tile.rows; ++y) {
            const int64_t pixel = (block.image * g.vertical.size + tile.y + y) * g.horizontal.size + tile.x;
            T* const row = static_cast<T*>(out) + pixel * p.grad_pixel + head * g.head_channels;
            for (int64_t first = 0; first < tile.columns; first += kLanes) {
                const int64_t count = tile.columns - first < kLanes ? tile.columns - first : kLanes;
                Vec sums[branches][kLanes]{};
                for (int64_t i = 0; i < count; ++i) {
                    const int64_t x = first + i;
                    Vec token_sums[branches]{};
                    body(y * tile.columns + x, y, x, row + x * p.grad_pixel, token_sums);
                    for (int branch = 0; branch < branches; ++branch) {
                        sums[branch][i] = token_sums[branch];
                    }
                }
                for (int branch = 0; branch < branches && branches == 2 && first_map >= 0; ++branch) {
                    store(p.token_row(first_map + branch, head, block.image, tile.y + y, tile.x + first),
                          sum_each(sums[branch]), count);
                }
            }
        }
    }

    // dq = sum over the branches of w^2 (dG k + slope q); the gradient of w is w times the token sum.
    void gradient_of_q() const {
        multiply(k, 0);
        const TokenWeights<branches> weights(g, head, tile);
        write(p.grad_q, 0, [&](int64_t token, int64_t y, int64_t x, T* out, Vec* sums) {
            for_vectors(g.head_channels, [&](int64_t c, int64_t n) {
                const Vec q_value = load(q + token * g.depth + c), k_value = load(k + token * g.depth + c);
                const Vec k_square = k_value * k_value;
                Vec total{};
                for (int branch = 0; branch < branches; ++branch) {
                    const Vec dg_k = load(products + (token * branches + branch) * g.depth + c);
                    const Vec gradient = fma(load(slopes(branch, 0) + c), q_value, dg_k);
                    sums[branch] = fma(q_value, gradient + dg_k, sums[branch]);
                    sums[branch] = fma(load(slopes(branch, 1) + c), k_square, sums[branch]);
                    total = fma(weights.at(branch, y, x), gradient, total);
                }
                store(out + c, total, n);
            });
        });
    }

    // dk = sum over the branches of w^2 (dG^T q + slope k)
    void gradient_of_k() const {
        multiply(q, 1);
        const TokenWeights<branches> weights(g, head, tile);
        write(p.grad_k, -1, [&](int64_t token, int64_t y, int64_t x, T* out, Vec*) {
            for_vectors(g.head_channels, [&](int64_t c, int64_t n) {
                const Vec k_value = load(k + token * g.depth + c);
                Vec total{};
                for (int branch = 0; branch < branches; ++branch) {
                    const Vec dg_q = load(products + (token * branches + branch) * g.depth + c);
                    total = fma(weights.at(branch, y, x), fma(load(slopes(branch, 1) + c), k_value, dg_q), total);
                }
                store(out + c, total, n);
            });
        });
    }

    // dv = sum over the branches of merge A^T grad; the gradient of merge is v A^T grad.
    void gradient_of_v() const {
        float* const grad = q;
        stage(p.grad, grad);
        multiply(grad, 2);
        const Tokens<T> v(g, p.v, block, tile, head);
        const MergeWeights<branches> weights(g, head, tile);
        write(p.grad_v, 2, [&](int64_t token, int64_t y, int64_t x, T* out, Vec* sums) {
            const T* const v_token = v.at(y, x);
            for_vectors(g.head_channels, [&](int64_t c, int64_t n) {
                const Vec v_value = load(v_token + c, n);
                Vec total{};
                for (int branch = 0; branch < branches; ++branch) {
                    const Vec a_grad = load(products + (token * branches + branch) * g.depth + c);
                    sums[branch] = fma(v_value, a_grad, sums[branch]);
                    total = fma(weights.at(branch, y, x), a_grad, total);
                }
                store(out + c, total, n);
            });
        });
    }
};

template <typename T, int branches>
void apply(const Params& p, int64_t begin, int64_t end, float* scratch) {
    const Groups& g = p.groups;
    float *const q = scratch, *const k = q + kTileTokens * g.depth, *const products = k + kTileTokens * g.depth;
    for (int64_t index = begin; index < end; ++index) {
        const Block block(g.vertical, g.horizontal, index / g.heads);
        const int64_t head = index % g.heads;
        const float* matrices[branches];
        for (int branch = 0; branch < branches; ++branch) {
            const int64_t y = window_of(g.vertical, branch, block.y), x = window_of(g.horizontal, branch, block.x);
            matrices[branch] =
                p.matrices_of((block.image * g.vertical.windows() + y) * g.horizontal.windows() + x, head, branch);
        }
        for (int64_t t = 0; t < block.tiles(); ++t) {
            const Tile tile = block.tile(t);
            const ApplyTile<T, branches> apply_tile{p, g, block, tile, head, matrices, q, k, products};
            const Tile next = next_tile(block, t);
            Tokens<T>(g, p.q, block, next, head).template prefetch<false>(next, g.head_channels);
            Tokens<T>(g, p.k, block, next, head).template prefetch<false>(next, g.head_channels);
            Tokens<T>(g, p.v, block, tile, head).template prefetch<false>(tile, g.head_channels);
            Tokens<T>(g, p.grad, block, tile, head).template prefetch<false>(tile, g.head_channels);
            Tokens<T>(g, {p.grad_q, p.grad_pixel}, block, tile, head).template prefetch<true>(tile, g.head_channels);
            Tokens<T>(g, {p.grad_k, p.grad_pixel}, block, tile, head).template prefetch<true>(tile, g.head_channels);
            Tokens<T>(g, {p.grad_v, p.grad_pixel}, block, tile, head).template prefetch<true>(tile, g.head_channels);
            apply_tile.stage(p.q, q);
            apply_tile.stage(p.k, k);
            apply_tile.gradient_of_q();
            apply_tile.gradient_of_k();
            apply_tile.gradient_of_v();
        }
    }
}

// body(value of the storage type, Constant<branches>)
template <typename Body>
void dispatch(const Params& p, const Body& body) {
    const auto with_branches = [&](auto type) {
        return p.groups.branches == 1 ? body(type, Constant<1>{}) : body(type, Constant<2>{});
    };
    switch (p.dtype) {
        case DType::f32:
            return with_branches(float{});
        case DType::bf16:
            return with_branches(BFloat16{});
        case DType::f16:
            return with_branches(Half{});
    }
}

void gram_any(const Params& p, int64_t begin, int64_t end, float* scratch) {
    dispatch(
        p, [&](auto type, auto branches) { gram<decltype(type), decltype(branches)::value>(p, begin, end, scratch); });
}

void apply_any(const Params& p, int64_t begin, int64_t end, float* scratch) {
    dispatch(
        p, [&](auto type, auto branches) { apply<decltype(type), decltype(branches)::value>(p, begin, end, scratch); });
}

}  // namespace

const ChannelAttentionBackwardKernels IPT_FAST_THIS_ISA(channel_attention_backward) = {gram_any, attend, apply_any};

}  // namespace ipt_fast
