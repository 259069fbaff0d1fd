// Backward of channel attention in windows, framework-free. Serves channel_attention (one branch, no weights) and
// focal_channel_attention (two branches).
#pragma once

#include "channel_attention_kernel.h"

namespace ipt_fast::cpu {

struct ChannelAttentionBackwardParams {
    DType dtype;
    Groups groups;  // without slots
    Pixels q, k, v, grad;
    void *grad_q, *grad_k, *grad_v;  // channels of head 0 first
    int64_t grad_pixel;              // values between their pixels
    // (blocks, heads): for each branch the Gram matrix of w^2 k and q, [k][q], and that of the merge weight times v and
    // grad, [v][grad], then the squared norms and the factors as in channel_attention.h.
    float* slots;
    // (windows, heads, branches): the gradient of the Gram matrix as [k][q] and as [q][k], the attention [q][k], what
    // the norms add to the gradients of q and k for each of their values, and the units of q and of k: powers of two by
    // which values are multiplied to meet these, and gradients that come of them; 1 where fp32 holds them without.
    float* matrices;
    double* grad_scale;  // (windows, heads, branches)
    // (4, heads, images, rows, columns), two branches only: the sums over channels that the gradients of the token
    // weights in windows and in shifted windows, and of both merge weights, are made of.
    float* token_sums;

    IPT_FAST_INLINE int64_t slot_size() const { return groups.depth * 2 * (groups.branches * (groups.depth + 1) + 1); }
    IPT_FAST_INLINE float* slot(int64_t block, int64_t head) const {
        return slots + (block * groups.heads + head) * slot_size();
    }
    IPT_FAST_INLINE float* factors(float* slot) const {
        return slot + groups.branches * groups.depth * 2 * (groups.depth + 1);
    }
    IPT_FAST_INLINE int64_t matrices_size() const { return groups.depth * (3 * groups.depth + 4); }
    IPT_FAST_INLINE const float* units(const float* matrices) const {
        return matrices + groups.depth * (3 * groups.depth + 2);
    }
    IPT_FAST_INLINE float* matrices_of(int64_t window, int64_t head, int branch) const {
        return matrices + ((window * groups.heads + head) * groups.branches + branch) * matrices_size();
    }
    IPT_FAST_INLINE float* token_row(int64_t map, int64_t head, int64_t image, int64_t y, int64_t x) const {
        const Groups& g = groups;
        return token_sums + (((map * g.heads + head) * g.images + image) * g.vertical.size + y) * g.horizontal.size + x;
    }
    // Floats of scratch of gram, apply and attend.
    IPT_FAST_INLINE int64_t scratch() const {
        const int64_t d = groups.depth, branches = groups.branches;
        const int64_t tiles = (branches + 2) * kTileTokens * d + branches * matrices_size() + 2 * d * (branches + 2);
        const int64_t sums = 2 * d * (3 * d + 12);
        return round_up(tiles > sums ? tiles : sums, kChannelPad);
    }
};

struct ChannelAttentionBackwardKernels {
    // The slots, for begin <= block * heads + head < end.
    void (*gram)(const ChannelAttentionBackwardParams& params, int64_t begin, int64_t end, float* scratch);
    // The matrices, for begin <= (window * heads + head) * branches + branch < end.
    void (*attend)(const ChannelAttentionBackwardParams& params, int64_t begin, int64_t end, float* scratch);
    // The gradients of q, k, v and the token sums, for begin <= block * heads + head < end.
    void (*apply)(const ChannelAttentionBackwardParams& params, int64_t begin, int64_t end, float* scratch);

    static const ChannelAttentionBackwardKernels IPT_FAST_COMPILED_LEVELS;
};

}  // namespace ipt_fast::cpu
