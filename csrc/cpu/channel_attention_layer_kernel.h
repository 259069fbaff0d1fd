// Whole layers of channel attention for inference, framework-free:
// x + gate * PW(attention(DW3x3(PW(layer norm(x))))), every convolution with or without a bias, with any groups. Serves
// channel_attention_layer (one branch, the depthwise convolution and x may be absent) and focal_attention_layer (two
// branches).
#pragma once

#include "channel_attention_kernel.h"
#include "kernels.h"

namespace ipt_fast::cpu {

// Rows of q, k and v before the depthwise convolution that are kept: those of one tile, their halo, and the next
// tile's.
constexpr int64_t kRingRows = 2 * kTileRows;
// What one thread keeps of them should leave room for the rest in the second cache.
constexpr int64_t kRingBytes = 448 << 10;

struct ChannelAttentionLayerParams {
    DType dtype;
    Brgemm brgemm;
    Groups groups;
    int64_t images;             // of the map
    Axis vertical, horizontal;  // the blocks of pass 1: those of the groups, or with a dilation any of the map
    Norm norm;
    Epilogue epilogue;
    bool residual;  // whether x is added
    const void* x;  // dense
    void* out;      // dense; holds v between the passes
    void* queries;  // dense, q and then k of each pixel, where the groups have a dilation; else nullptr
    Weight qkv, project;
    int64_t halo;  // pixels around its own that the depthwise convolution reads: 1, or 0 where there is none
    // The depthwise convolution reads q, k and v without their bias b. So it reads -b, not 0, outside of the image, and
    // its sums start with b times the sum of the taps, and with its own bias.
    const float* depthwise;  // (heads, taps() + 1, 3, depth): the taps, and what the sums start with
    const float* outside;    // (heads, 3, depth); nullptr: zeros
    void* packed;            // weights of q, k and v of each head, then the projection's
    // The projection of the attention of a whole image is one product with v: its weights are these, times the
    // attention.
    const float*
        project_rows;      // (channels, padded channels), the projection's weight transposed; nullptr: two products
    void* joint;           // (images) packed weights, or nullptr
    int64_t strips;        // parts side by side of an image
    int64_t head_groups;   // heads are computed in so many groups
    int64_t block_shares;  // a block is shared by so many threads in pass 2

    IPT_FAST_INLINE int64_t channels() const { return groups.heads * groups.head_channels; }
    IPT_FAST_INLINE int64_t taps() const { return (2 * halo + 1) * (2 * halo + 1) * halo; }
    IPT_FAST_INLINE int64_t first_block(int64_t strip) const { return strip * horizontal.blocks() / strips; }
    IPT_FAST_INLINE int64_t first_head(int64_t group) const { return group * groups.heads / head_groups; }

    // Room for the packed weights, whichever the unit.
    IPT_FAST_INLINE int64_t packed_part_bytes() const {
        return packed_floats(dtype, brgemm, groups.depth, channels()) * 4;
    }
    IPT_FAST_INLINE int64_t packed_project_bytes() const {
        return packed_floats(dtype, brgemm, channels(), channels()) * 4;
    }
    IPT_FAST_INLINE int64_t packed_bytes() const {
        return 3 * groups.heads * packed_part_bytes() + packed_project_bytes();
    }
    IPT_FAST_INLINE char* packed_part(int64_t part) const {
        return static_cast<char*>(packed) + part * packed_part_bytes();
    }
    IPT_FAST_INLINE char* joint_of(int64_t image) const {
        return static_cast<char*>(joint) + image * packed_project_bytes();
    }

    // Pixels of a row of the widest strip, with its halo.
    IPT_FAST_INLINE int64_t row_pixels() const {
        int64_t most = 0;
        for (int64_t strip = 0; strip < strips; ++strip) {
            const int64_t columns = horizontal.end(first_block(strip + 1) - 1) - horizontal.begin(first_block(strip));
            most = columns > most ? columns : most;
        }
        return most + 2 * halo;
    }
    // Floats of scratch: a row of x, normalised rows of a tile, the ring, and a tile of q and k.
    IPT_FAST_INLINE int64_t pixels_size() const { return row_pixels() * padded(channels()); }
    IPT_FAST_INLINE int64_t ring_size() const {
        const int64_t most_heads = (groups.heads + head_groups - 1) / head_groups;
        return most_heads * kRingRows * row_pixels() * 3 * groups.depth;
    }
    IPT_FAST_INLINE int64_t gram_scratch() const {
        return (1 + kTileRows) * pixels_size() + ring_size() + cpu::gram_scratch(groups);
    }
    IPT_FAST_INLINE int64_t join_scratch() const {
        return project_rows == nullptr ? 0 : channels() * padded(channels());
    }
    // A tile of weighted v, its attended values (in both types of value), and the layer's output.
    IPT_FAST_INLINE int64_t attended_row() const { return padded(channels()) + kChannelPad; }
    IPT_FAST_INLINE int64_t apply_scratch() const {
        return cpu::apply_scratch(groups) + 3 * kTileTokens * attended_row();
    }
};

struct ChannelAttentionLayerKernels {
    // Parts begin <= part < end of 3 * heads + 1 of the packed weights.
    void (*pack)(const ChannelAttentionLayerParams& params, int64_t begin, int64_t end);
    // Gram matrices, norms and v, or with a dilation q, k and v, for
    // begin <= ((image * head_groups + group) * strips + strip) * blocks down + block < end.
    void (*gram)(const ChannelAttentionLayerParams& params, int64_t begin, int64_t end, float* scratch);
    // The weights in `joint`, for begin <= image < end.
    void (*join)(const ChannelAttentionLayerParams& params, int64_t begin, int64_t end, float* scratch);
    // The output, for begin <= block * block_shares + share < end.
    void (*apply)(const ChannelAttentionLayerParams& params, int64_t begin, int64_t end, float* scratch);

    static const ChannelAttentionLayerKernels IPT_FAST_COMPILED_LEVELS;
};

}  // namespace ipt_fast::cpu
