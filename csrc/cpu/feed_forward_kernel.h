// The feed-forward networks of leffn, leffn_layer and feed_forward_layer, framework-free: raw pointers and sizes.
#pragma once

#include "kernels.h"

namespace ipt_fast::cpu {

// What is projected, of the convolved map c.
enum class Tail {
    convolved,       // c
    activated,       // GELU(c)
    added,           // g + GELU(c), g being what was convolved
    activated_gate,  // GELU(c) of the first half of the hidden channels times c of the second
    gate,            // the first half, which is not convolved, times c of the second
};

// What a feed-forward network does with its expanded map: GELU or not, depthwise convolution or not, tail.
struct Form {
    bool activates, convolves;
    Tail tail;

    IPT_FAST_INLINE int64_t halves() const { return tail == Tail::activated_gate || tail == Tail::gate ? 2 : 1; }
    // Of the halves, those that are convolved: the last ones.
    IPT_FAST_INLINE int64_t convolved_halves() const { return tail == Tail::activated_gate ? 2 : 1; }
};

constexpr Form kLeffn = {true, true, Tail::convolved};

// Hidden channels are computed in blocks of this many, of each half.
constexpr int64_t kHiddenBlock = 64;
// Most pixels of a strip without a convolution.
constexpr int64_t kPixels = 96;

// out = (x if residual) + epilogue(project(form(expand(norm(x))))) of dense channels-last maps. An image is cut into
// bands of rows and strips of columns; a thread goes down one strip of a band in steps of `rows_per_step` rows. Without
// a convolution an image is one row of pixels, and a strip has at most kPixels.
//
// What belongs to hidden channels is [halves][padded hidden], and [convolved halves][padded hidden] of the convolution.
struct FeedForwardParams {
    DType dtype;  // of x, out and the pointwise weights
    const void* x;
    void* out;
    int64_t height, width, channels, out_channels, kernel;
    int64_t hidden;  // of one half
    Form form;
    Norm norm;
    Norm inner_norm;    // of the second half, before it is convolved
    Epilogue epilogue;  // for Tail::convolved, its bias holds that of the depthwise convolution, projected
    bool residual;
    Weight expand, project;
    const float* expand_bias;     // nullptr: there is none
    const float* depthwise;       // [padded hidden / kChannelPad][kernel * kernel][kChannelPad]
    const float* depthwise_bias;  // zeros where there is none; not for Tail::convolved
    Brgemm brgemm;
    int64_t bands, strips, rows_per_step;
    void *packed_expand, *packed_project;  // blocks() times those of a block, of `expand` for each half

    IPT_FAST_INLINE int64_t radius() const { return kernel / 2; }
    IPT_FAST_INLINE int64_t blocks() const { return (hidden + kHiddenBlock - 1) / kHiddenBlock; }
    // Floats that hold the packed weights of a block of hidden values and the channels on either side.
    IPT_FAST_INLINE int64_t expand_floats() const { return packed_floats(dtype, brgemm, kHiddenBlock, channels); }
    IPT_FAST_INLINE int64_t project_floats() const { return packed_floats(dtype, brgemm, out_channels, kHiddenBlock); }
    IPT_FAST_INLINE int64_t slots() const { return rows_per_step + kernel - 1; }  // hidden rows that are kept
    // Strips begin at whole vectors of pixels.
    IPT_FAST_INLINE int64_t first_column(int64_t strip) const {
        const int64_t column = (width + kChannelPad - 1) / kChannelPad * strip / strips * kChannelPad;
        return column < width ? column : width;
    }
    IPT_FAST_INLINE int64_t strip_width() const {  // of the widest one
        const int64_t vectors = (width + kChannelPad - 1) / kChannelPad;
        return (vectors + strips - 1) / strips * kChannelPad;
    }
};

struct FeedForwardKernels {
    // Bytes of scratch memory of one thread.
    int64_t (*scratch_size)(const FeedForwardParams& params);
    // Packs the weights of the blocks begin <= k < end.
    void (*pack)(const FeedForwardParams& params, int64_t begin, int64_t end);
    // Shares begin <= k < end: k is image k / (bands * strips), and in it band and strip.
    void (*forward)(const FeedForwardParams& params, int64_t begin, int64_t end, void* scratch);

    static const FeedForwardKernels IPT_FAST_COMPILED_LEVELS;
};

}  // namespace ipt_fast::cpu
