// Channel attention in windows, framework-free: raw pointers and sizes. Serves channel_attention (one branch, no
// weights) and focal_channel_attention (two branches).
#pragma once

#include "common/windows.h"
#include "kernels.h"

namespace ipt_fast::cpu {

// What one block of the map keeps for one head, in fp32 ("slot"): for each branch the matrix [depth of k][depth of q],
// then for each branch the squared norms of q's and of k's channels, then the factors of q's and of k's channels:
// powers of two by which the block's values are multiplied in all of these, other than 1 where fp32 could not hold
// their squares. The matrix is first the block's Gram matrix, then the transposed attention of the block's window.
namespace {
inline int64_t slot_size(int64_t branches, int64_t depth) { return depth * (branches * (depth + 2) + 2); }
}  // namespace

// The groups of an attention: what does not depend on where q, k and v come from.
struct Groups {
    int64_t images, heads;
    int64_t head_channels;  // d
    int64_t depth;          // d rounded up to kChannelPad
    int branches;           // 1 or 2
    Axis vertical, horizontal;
    const float* token_squares;  // (heads, p, p), squares of the token weights; two branches only
    const float* merge[2];       // (heads, p, p) of the two branches; two branches only
    const float* scale;          // (heads), multiplies the normalised products
    float* slots;                // (images, blocks down, blocks across, heads) slots

    IPT_FAST_INLINE int64_t blocks() const { return images * vertical.blocks() * horizontal.blocks(); }
    IPT_FAST_INLINE int64_t windows() const { return images * vertical.windows() * horizontal.windows(); }
    IPT_FAST_INLINE int64_t slots_bytes() const {
        return blocks() * heads * slot_size(branches, depth) * static_cast<int64_t>(sizeof(float));
    }
    IPT_FAST_INLINE float* slot(int64_t block, int64_t head) const {
        return slots + (block * heads + head) * slot_size(branches, depth);
    }
    IPT_FAST_INLINE float* norms(float* slot, int branch) const {
        return slot + depth * (branches * depth + 2 * branch);
    }
    IPT_FAST_INLINE float* factors(float* slot) const { return norms(slot, branches); }
    // Where the weights of a tile begin in a (heads, p, p) map.
    IPT_FAST_INLINE const float* weights(const float* map, int branch, int64_t head, const Tile& tile) const {
        const int64_t p = vertical.window;
        return map + (head * p + vertical.position(branch, tile.y)) * p + horizontal.position(branch, tile.x);
    }
};

// A dense map whose pixels are `stride` values apart.
struct Pixels {
    const void* data;
    int64_t stride;
};

struct ChannelAttentionParams {
    DType dtype;
    Groups groups;
    Pixels q, k, v;  // channels of head 0 first
    void* out;       // dense
};

namespace {

// Floats of scratch of a tile's Gram matrix, of its output without the result, and of a window's softmax.
inline int64_t gram_scratch(const Groups& g) {
    return kTileTokens * g.depth * (1 + g.branches) + g.branches * g.depth * g.depth + 2 * g.depth * (g.branches + 1);
}
inline int64_t apply_scratch(const Groups& g) { return kTileTokens * g.depth * 3; }
inline int64_t attend_scratch(const Groups& g) { return g.depth * (3 * g.depth + 12); }

}  // namespace

struct ChannelAttentionKernels {
    // Gram matrices and norms into the slots, for begin <= block * heads + head < end.
    void (*gram)(const ChannelAttentionParams& params, int64_t begin, int64_t end, float* scratch);
    // Gram matrices to attention, for begin <= (window * heads + head) * branches + branch < end.
    void (*attend)(const Groups& groups, int64_t begin, int64_t end, float* scratch);
    // The output, for begin <= block * heads + head < end.
    void (*apply)(const ChannelAttentionParams& params, int64_t begin, int64_t end, float* scratch);

    static const ChannelAttentionKernels IPT_FAST_COMPILED_LEVELS;
};

}  // namespace ipt_fast::cpu
