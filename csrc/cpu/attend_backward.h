// The backward of channel attention between the Gram matrices and the pixels: all that is d x d, for one window.
#pragma once

#include <string.h>

#include "channel_attention_kernel.h"
#include "gram.h"
#include "vec.h"

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
// differences of nearly equal terms. Rows of a matrix are k's (v's) channels, columns q's (grad's).
inline void attend_window(const ChannelAttentionBackwardParams& p, int64_t image, int64_t window_y, int64_t window_x,
                          int64_t head, int branch, double* scratch, float* out, double* grad_scale) {
    const Groups& g = p.groups;
    const int64_t depth = g.depth, channels = g.head_channels, matrix = depth * depth;
    double *const scores = scratch, *const grads = scores + matrix;  // both Gram matrices at first
    double *const q = grads + matrix, *const k = q + depth;          // squared norms at first
    double *const q_slopes = k + depth, *const k_slopes = q_slopes + depth;
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
            const WindowBlock block(g.vertical, g.horizontal, index);
            tokens += block.rows * block.columns;
            float* const slot = p.slot(index, head);
            add_slot(slot + branch * matrix, slot + 2 * (g.branches * matrix + branch * depth), p.factors(slot), depth,
                     scores, q, q_slopes);
            const float* const of_values = slot + (g.branches + branch) * matrix;
            for (int64_t n = 0; n < matrix; ++n) {
                grads[n] += of_values[n];
            }
        }
    }
    bool clamped = false;
    for (int64_t i = 0; i < 2 * depth; ++i) {  // of q, then of k
        const double norm = __builtin_sqrt(q[i]);
        clamped = clamped || (norm < 1e-12 && i % depth < channels);
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
    // a channel of one token is normalised to its sign, unless it is too small
    const double through = tokens == 1 && !clamped ? 0.0 : scale;
    double sizes[kChannelPad]{}, size = 0;  // of the largest gradient of a score
    for (int64_t j = 0; j < channels; ++j) {
        double row[kChannelPad]{};
        for (int64_t first = 0; first < depth; first += kChannelPad) {
            for (int64_t lane = 0; lane < kChannelPad; ++lane) {
                const int64_t i = first + lane;
                const double a = attention[j * depth + i] * sums[i], score = scores[j * depth + i];
                const double of_logit = a * (grads[j * depth + i] - means[i]), of_score = of_logit * through;
                const double magnitude = __builtin_fabs(of_score);
                of_scales[i] += of_logit * score;
                slopes[i] += of_score * score;
                row[lane] += of_score * score;
                grads[j * depth + i] = of_score;
                sizes[lane] = magnitude > sizes[lane] ? magnitude : sizes[lane];
                of_values[j * depth + i] = static_cast<float>(a);
            }
        }
        double slope = 0;
        for (int64_t lane = 0; lane < kChannelPad; ++lane) {
            slope += row[lane];
        }
        k_slopes[j] *= slope;
    }
    for (const double each : sizes) {
        size = each > size ? each : size;
    }
    *grad_scale = 0;
    for (int64_t i = 0; i < depth; ++i) {
        *grad_scale += of_scales[i];
        q_slopes[i] *= slopes[i];
    }
    float* const units = out + depth * (3 * depth + 2);
    find_units(q, channels, depth, size, units);
    for (int64_t i = 0; i < 2 * depth; ++i) {  // of q, then of k
        q[i] /= units[i];
        const double slope = q_slopes[i] / units[i] / units[i];
        out[3 * matrix + i] = i % depth < channels ? static_cast<float>(slope) : 0.0f;
    }
    for (int64_t j = 0; j < channels; ++j) {
        for (int64_t i = 0; i < depth; ++i) {
            of_gram[j * depth + i] = static_cast<float>(grads[j * depth + i] * q[i] * k[j]);
        }
    }
    transpose_matrix(of_values, depth, out + 2 * matrix);
    transpose_matrix(of_gram, depth, out + matrix);
}

}  // namespace
}  // namespace ipt_fast::cpu
