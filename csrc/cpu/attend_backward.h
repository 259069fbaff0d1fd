// The backward of channel attention between the Gram matrices and the pixels: all that is d x d, for one window.
#pragma once

#include <string.h>

#include "channel_attention_kernel.h"
#include "units.h"
#include "vec.h"
#include "window_attend.h"

namespace ipt_fast::cpu {
namespace {

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

// The units of q and of k, see channel_attention_kernel.h: close to the inverses of their norms where the square of a
// value, or the product of two inverses and a gradient, of which the largest is `size`, could leave the range of fp32.
inline void find_units(const double* inverses, int64_t channels, int64_t depth, double size, float* units) {
    double least = inverses[0], most = least;
    for (int64_t i = 0; i < 2 * depth; ++i) {
        if (i % depth < channels) {
            least = inverses[i] < least ? inverses[i] : least;
            most = inverses[i] > most ? inverses[i] : most;
        }
    }
    const bool fits =
        least >= 0x1p-50 && (size == 0 || (size * least * least >= 0x1p-90 && size * most * most <= 0x1p110));
    for (int64_t i = 0; i < 2 * depth; ++i) {
        uint64_t bits;
        memcpy(&bits, inverses + i, sizeof(bits));
        bits &= 0x7ffull << 52;  // a power of two
        double power;
        memcpy(&power, &bits, sizeof(power));
        units[i] = fits || i % depth >= channels ? 1.0f : static_cast<float>(power < 0x1p-126 ? 0x1p-126 : power);
    }
}

// Everything of one window, head and branch that is d x d, in fp64 because the gradients of normalised vectors are
// differences of nearly equal terms.
//
// Rows of a matrix are k's (v's) channels, columns q's (grad's). "[2]" is of q, then of k.
struct WindowBackward {
    const ChannelAttentionBackwardParams& p;
    const Groups& g;
    const HeadWindow window;
    const int branch;
    const int64_t head;
    const int64_t channels, depth, matrix;

    // In scratch memory.
    double* const scores;     // [depth][depth], the Gram matrix of w^2 k and q, then their cosines
    double* const grads;      // [depth][depth], the gradients of the attention, then of the cosines
    double* const inverses;   // [2][depth], the squared norms, then the norms' inverses, then those in units
    double* const through;    // [2][depth], 1 where a gradient goes through the norm, else 0
    double* const norms;      // [2][depth], in units
    double* const most;       // [depth], the largest logit of each column
    double* const sums;       // [depth], of a column's exponentials, then their inverses
    double* const means;      // [depth], of the gradients of a column's attention, weighted with it
    double* const slopes;     // [depth], what the norms of q add to the gradient of each value, divided by the value
    double* const of_scales;  // [depth], a column's part of the gradient of the scale
    double* const attention;  // [depth][depth], the exponentials

    // The result, `matrices` of ChannelAttentionBackwardParams.
    float* const of_gram;             // [depth][depth]
    float* const of_gram_transposed;  // [depth][depth]; holds the attention until that is transposed
    float* const attention_transposed;
    float* const out_slopes;  // [2][depth]
    float* const units;       // [2][depth]

    int64_t tokens = 0;     // of the window
    bool clamped = false;   // whether a norm is too small to divide by
    double largest = 0;     // gradient of a cosine
    double grad_scale = 0;  // gradient of the scale

    WindowBackward(const ChannelAttentionBackwardParams& params, const HeadWindow& window_, double* scratch)
        : p(params),
          g(params.groups),
          window(window_),
          branch(window.branch),
          head(window.head),
          channels(g.head_channels),
          depth(g.depth),
          matrix(depth * depth),
          scores(scratch),
          grads(scores + matrix),
          inverses(grads + matrix),
          through(inverses + 2 * depth),
          norms(through + 2 * depth),
          most(norms + 2 * depth),
          sums(most + depth),
          means(sums + depth),
          slopes(means + depth),
          of_scales(slopes + depth),
          attention(of_scales + depth),
          of_gram(p.matrices_of(window.index, head, branch)),
          of_gram_transposed(of_gram + matrix),
          attention_transposed(of_gram + 2 * matrix),
          out_slopes(of_gram + 3 * matrix),
          units(out_slopes + 2 * depth) {}

    void run() {
        gather_blocks();
        invert_norms();
        normalise();
        softmax();
        find_gradients();
        choose_units();
        write();
    }

  private:
    // The sums over the window's blocks of both Gram matrices and of the squared norms.
    void gather_blocks() {
        memset(scores, 0, matrix * sizeof(double));
        memset(grads, 0, matrix * sizeof(double));
        memset(inverses, 0, 2 * depth * sizeof(double));
        for_window_blocks(g, window, [&](int64_t index, const WindowBlock& block) {
            tokens += block.tokens();
            const float share = share_of_window(g, block);
            float* const slot = p.slot(index, head);
            const float* const squares = slot + 2 * (g.branches * matrix + branch * depth);
            add_slot(slot + branch * matrix, squares, p.factors(slot), depth, scores, inverses, norms);
            const float* const of_values = slot + (g.branches + branch) * matrix;
            for (int64_t n = 0; n < matrix; ++n) {
                grads[n] += share * of_values[n];
            }
        });
    }

    void invert_norms() {
        for (int64_t i = 0; i < 2 * depth; ++i) {
            const double norm = __builtin_sqrt(inverses[i]);
            clamped = clamped || (norm < 1e-12 && i % depth < channels);
            inverses[i] = 1.0 / (norm < 1e-12 ? 1e-12 : norm);
            through[i] = norm < 1e-12 || i % depth >= channels ? 0.0 : 1.0;
        }
    }

    // Products become cosines; the largest logit of each column.
    void normalise() {
        const double *const q = inverses, *const k = inverses + depth;
        const double scale = g.scale[branch][head];
        for (int64_t j = 0; j < channels; ++j) {
            double* const score = scores + j * depth;
            for (int64_t i = 0; i < depth; ++i) {
                score[i] *= q[i] * k[j];
                const double logit = score[i] * scale;
                most[i] = j == 0 || logit > most[i] ? logit : most[i];
            }
        }
    }

    // The attention but for the sums of its columns, and its weighted means of the gradients.
    void softmax() {
        const double scale = g.scale[branch][head];
        memset(sums, 0, depth * sizeof(double));
        memset(means, 0, depth * sizeof(double));
        float* const logits = of_gram;  // not yet in use
        for (int64_t j = 0; j < channels; ++j) {
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
    }

    // The gradients of the logits, the cosines and the scale.
    void find_gradients() {
        memset(of_scales, 0, depth * sizeof(double));
        float* const softmax = of_gram_transposed;
        memset(of_gram + channels * depth, 0, (depth - channels) * depth * sizeof(float));
        memset(softmax + channels * depth, 0, (depth - channels) * depth * sizeof(float));
        // a channel of one token is normalised to its sign, unless it is too small
        const double slope = tokens == 1 && !clamped ? 0.0 : g.scale[branch][head];
        double sizes[kChannelPad]{};
        for (int64_t j = 0; j < channels; ++j) {
            for (int64_t first = 0; first < depth; first += kChannelPad) {
                for (int64_t lane = 0; lane < kChannelPad; ++lane) {
                    const int64_t i = first + lane;
                    const double a = attention[j * depth + i] * sums[i], score = scores[j * depth + i];
                    const double of_logit = a * (grads[j * depth + i] - means[i]), of_score = of_logit * slope;
                    const double magnitude = __builtin_fabs(of_score);
                    of_scales[i] += of_logit * score;
                    grads[j * depth + i] = of_score;
                    sizes[lane] = magnitude > sizes[lane] ? magnitude : sizes[lane];
                    softmax[j * depth + i] = static_cast<float>(a);
                }
            }
        }
        for (const double each : sizes) {
            largest = each > largest ? each : largest;
        }
        for (int64_t i = 0; i < depth; ++i) {
            grad_scale += of_scales[i];
        }
    }

    // The units, the inverses of the norms and the norms in them.
    void choose_units() {
        find_units(inverses, channels, depth, largest, units);
        for (int64_t i = 0; i < 2 * depth; ++i) {
            inverses[i] /= units[i];
            norms[i] = 1.0 / inverses[i];
        }
    }

    // The gradient of the Gram matrix, rounded as products take it; the slopes, made of what is rounded, so that both
    // parts of a gradient cancel where they should; the transpose of both matrices.
    void write() {
        const double *const q = inverses, *const k = inverses + depth;
        for (int64_t j = 0; j < channels; ++j) {
            for (int64_t i = 0; i < depth; ++i) {
                of_gram[j * depth + i] = static_cast<float>(grads[j * depth + i] * q[i] * k[j]);
            }
        }
        with_types(p.dtype, p.brgemm, [&](auto, const auto& unit) { round_values(unit, of_gram, channels * depth); });
        memset(slopes, 0, depth * sizeof(double));
        for (int64_t j = 0; j < channels; ++j) {
            double parts[kChannelPad]{}, slope = 0;
            for (int64_t first = 0; first < depth; first += kChannelPad) {
                for (int64_t lane = 0; lane < kChannelPad; ++lane) {
                    const int64_t i = first + lane;
                    const double of_score = of_gram[j * depth + i] * scores[j * depth + i];
                    slopes[i] += of_score * norms[depth + j];
                    parts[lane] += of_score * norms[i];
                }
            }
            for (const double part : parts) {
                slope += part;
            }
            out_slopes[depth + j] = static_cast<float>(-through[depth + j] * k[j] * slope);
        }
        for (int64_t i = 0; i < depth; ++i) {
            out_slopes[i] = static_cast<float>(-through[i] * q[i] * slopes[i]);
        }
        memset(out_slopes + depth + channels, 0, (depth - channels) * sizeof(float));
        transpose_matrix(of_gram_transposed, depth, attention_transposed);
        transpose_matrix(of_gram, depth, of_gram_transposed);
    }
};

}  // namespace
}  // namespace ipt_fast::cpu
