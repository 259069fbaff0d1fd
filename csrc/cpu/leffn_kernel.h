// The feed-forward network of leffn, framework-free: raw pointers and sizes.
#pragma once

#include "kernels.h"

namespace ipt_fast::cpu {

// Hidden channels are computed in blocks of this many.
constexpr int64_t kHiddenBlock = 64;

// out = (x if residual) + project(depthwise(GELU(expand(norm(x))))) of dense channels-last maps. An image is cut into
// bands of rows and strips of columns; a thread goes down one strip of a band in steps of `rows_per_step` rows.
struct LeffnParams {
    DType dtype;  // of x, out and the pointwise weights
    const void* x;
    void* out;
    int64_t height, width, channels, hidden, out_channels, kernel;
    Norm norm;
    bool residual;
    Weight expand, project;
    const float* depthwise;  // [padded hidden / kChannelPad][kernel * kernel][kChannelPad]
    Brgemm brgemm;
    int64_t bands, strips, rows_per_step;
    void *packed_expand, *packed_project;  // packed_floats() each

    IPT_FAST_INLINE int64_t radius() const { return kernel / 2; }
    IPT_FAST_INLINE int64_t blocks() const { return (hidden + kHiddenBlock - 1) / kHiddenBlock; }
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

// Floats that hold the packed weights of one projection.
namespace {
inline int64_t packed_floats(const LeffnParams& p, int64_t channels) {
    return p.blocks() * kHiddenBlock * padded(channels);
}
}  // namespace

struct LeffnKernels {
    // Bytes of scratch memory of one thread.
    int64_t (*scratch_size)(const LeffnParams& params);
    // Packs the weights of the blocks begin <= k < end.
    void (*pack)(const LeffnParams& params, int64_t begin, int64_t end);
    // Shares begin <= k < end: k is image k / (bands * strips), and in it band and strip.
    void (*forward)(const LeffnParams& params, int64_t begin, int64_t end, void* scratch);

    static const LeffnKernels IPT_FAST_COMPILED_LEVELS;
};

}  // namespace ipt_fast::cpu
