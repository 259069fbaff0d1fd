// Channel attention in windows, framework-free: raw pointers and sizes. Serves channel_attention (one branch, no
// weights) and focal_channel_attention (two branches).
#pragma once

#include "kernels.h"
#include "window_blocks.h"

namespace ipt_fast::cpu {

// A slot is what one block of the map keeps for one head, in fp32. It consists of
//   for each branch, a matrix [depth of k][depth of q],
//   for each branch, the squared norms of q's channels and of k's,
//   the factors of q's channels and of k's.
// The matrix is the block's Gram matrix at first, and later the transposed attention of the block's window. A factor is
// a power of two by which a channel's values are multiplied in the matrices and norms. It is 1 unless fp32 could not
// hold the squares of the values.
namespace {
inline int64_t slot_size(int64_t branches, int64_t depth) { return depth * (branches * (depth + 2) + 2); }
}  // namespace

// The groups of an attention: what does not depend on where q, k and v come from.
//
// With a dilation, the pixels whose rows, and whose columns, leave the same remainder are an image of their own, here
// and in blocks: dilation^2 images for each one of the map. The first ones are the largest; `vertical` and `horizontal`
// are the axes of these.
struct Groups {
    int64_t images, heads;
    int64_t head_channels;  // d
    int64_t depth;          // d rounded up to kChannelPad
    int branches;           // 1 or 2
    bool inner;             // the second branch has a say only where none of its windows goes around the map's edges
    Axis vertical, horizontal;
    int64_t dilation;       // 1 without
    int64_t height, width;  // of the map
    // Of the branches, which may share them:
    const float* scale[2];          // (heads), multiplies the normalised products
    const float* token_squares[2];  // (heads, p, p), squares of the token weights; two branches only
    const float* merge[2];          // (heads, p, p); two branches only
    float* slots;                   // (images, blocks down, blocks across, heads) slots
    float* attention;               // (windows, heads) matrices where windows overlap

    IPT_FAST_INLINE bool overlapping() const { return vertical.step > 0 || horizontal.step > 0; }
    IPT_FAST_INLINE int64_t blocks() const { return images * vertical.blocks() * horizontal.blocks(); }
    IPT_FAST_INLINE WindowBlock block(int64_t index) const {
        WindowBlock block(vertical, horizontal, index);
        if (dilation > 1) {
            const int64_t top = block.image / dilation % dilation, left = block.image % dilation;
            block.rows = clipped(block.y, block.rows, (height - top + dilation - 1) / dilation);
            block.columns = clipped(block.x, block.columns, (width - left + dilation - 1) / dilation);
        }
        return block;
    }
    // The pixel of the map where an image begins. Rows are row() pixels apart, columns `dilation`.
    IPT_FAST_INLINE int64_t first_pixel(int64_t image) const {
        if (dilation == 1) {
            return image * height * width;
        }
        const int64_t top = image / dilation % dilation, left = image % dilation;
        return (image / dilation / dilation * height + top) * width + left;
    }
    IPT_FAST_INLINE int64_t row() const { return dilation * width; }
    IPT_FAST_INLINE int64_t pixel(int64_t image, int64_t y, int64_t x) const {
        return first_pixel(image) + y * row() + x * dilation;
    }
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
    // The branches that the result of a block is made of.
    IPT_FAST_INLINE int branches_of(const WindowBlock& block) const {
        if (!inner) {
            return branches;
        }
        const bool inside = block.y >= vertical.inner_begin() && block.y < vertical.inner_end() &&
                            block.x >= horizontal.inner_begin() && block.x < horizontal.inner_end();
        return inside ? branches : 1;
    }
    // Whether no block's result has a part from this window, the window (y, x) of its branch.
    IPT_FAST_INLINE bool unused(int branch, int64_t y, int64_t x) const {
        return inner && branch == 1 && (y + 1 == vertical.windows() || x + 1 == horizontal.windows());
    }
    IPT_FAST_INLINE int64_t attention_bytes() const {
        return overlapping() ? windows() * heads * depth * depth * static_cast<int64_t>(sizeof(float)) : 0;
    }
    IPT_FAST_INLINE float* attention_of(int64_t window, int64_t head) const {
        return attention + (window * heads + head) * depth * depth;
    }
    // Where the weights of a tile begin in a (heads, p, p) map.
    IPT_FAST_INLINE const float* weights(const float* map, int branch, int64_t head, const Tile& tile) const {
        const int64_t p = vertical.window;
        return map + (head * p + vertical.position(branch, tile.y)) * p + horizontal.position(branch, tile.x);
    }

  private:
    // How many of `count` from `begin` on are below `end`.
    IPT_FAST_INLINE static int64_t clipped(int64_t begin, int64_t count, int64_t end) {
        return begin + count <= end ? count : begin < end ? end - begin : 0;
    }
};

struct ChannelAttentionParams {
    DType dtype;
    Brgemm brgemm;
    Groups groups;
    Pixels q, k, v;  // channels of head 0 first
    void* out;       // dense
};

namespace {

// Floats of scratch of a tile's Gram matrix, of its output without the result, and of a window's softmax.
inline int64_t gram_scratch(const Groups& g) {
    return 2 * kTileTokens * g.depth * (1 + g.branches) + g.branches * g.depth * g.depth +
           2 * g.depth * (g.branches + 1);
}
inline int64_t apply_scratch(const Groups& g) { return kTileTokens * g.depth * 3 + g.depth * g.depth; }
inline int64_t attend_scratch(const Groups& g) { return g.depth * (3 * g.depth + 12); }

}  // namespace

struct ChannelAttentionKernels {
    // Gram matrices and norms into the slots, for begin <= block * heads + head < end.
    void (*gram)(const ChannelAttentionParams& params, int64_t begin, int64_t end, float* scratch);
    // Gram matrices to attention, for begin <= (window * heads + head) * branches + branch < end.
    void (*attend)(const Groups& groups, int64_t begin, int64_t end, float* scratch);
    // Where windows overlap: the mean attention of a block's windows into its slots, for
    // begin <= block * heads + head < end.
    void (*average)(const Groups& groups, int64_t begin, int64_t end);
    // The output, for begin <= block * heads + head < end.
    void (*apply)(const ChannelAttentionParams& params, int64_t begin, int64_t end, float* scratch);

    static const ChannelAttentionKernels IPT_FAST_COMPILED_LEVELS;
};

struct ChannelAttentionBackwardParams {
    DType dtype;
    Brgemm brgemm;
    Groups groups;  // without slots
    Pixels q, k, v, grad;
    void *grad_q, *grad_k, *grad_v;  // channels of head 0 first
    int64_t grad_pixel;              // values between their pixels
    // (blocks, heads) slots. Each consists of
    //   for each branch, the Gram matrix of w^2 k and q, [k][q],
    //   for each branch, the Gram matrix of the merge weight times v and grad, [v][grad],
    //   the squared norms and the factors as in a slot of the forward.
    float* slots;
    // (windows, heads, branches): what the gradients of a window's values are computed with. Each consists of
    //   the gradient of the Gram matrix as [k][q] and as [q][k],
    //   the attention [q][k],
    //   for each channel of q and of k, what its norm adds to the gradient of a value, as a multiple of the value,
    //   for each channel of q and of k, its unit.
    // A unit is a power of two: values are multiplied by it before they meet these matrices, and so are the gradients
    // that come of them. It is 1 unless fp32 could not hold the products.
    float* matrices;
    double* grad_scale;  // (windows, heads, branches)
    // (4, heads, images, rows, columns), two branches only: the sums over channels that the gradients of the token
    // weights in windows and in shifted windows, and of both merge weights, are made of. Where only the first branch
    // has a say, the first of the four is all that is written.
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
        const int64_t room = kTileTokens * d * (1 + branches) + d * d;
        const int64_t windows = groups.overlapping() ? 4 : branches;  // that a block lies in, at most
        const int64_t tiles =
            (branches + 2) * kTileTokens * d + windows * matrices_size() + 2 * d * (branches + 2) + room;
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
