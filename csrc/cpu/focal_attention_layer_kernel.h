// The whole focal attention layer for inference, framework-free:
// x + gate * PW(focal channel attention(DW3x3(PW(layer norm(x))))), every convolution with or without a bias.
#pragma once

#include "channel_attention_kernel.h"
#include "kernels.h"

namespace ipt_fast::cpu {

// Rows of q, k and v before the depthwise convolution that are kept: those of one tile, their halo, and the next
// tile's.
constexpr int64_t kRingRows = 2 * kTileRows;
// What one thread keeps of them should leave room for the rest in the second cache.
constexpr int64_t kRingBytes = 448 << 10;

struct FocalAttentionLayerParams {
    DType dtype;
    Brgemm brgemm;
    Groups groups;
    Norm norm;
    Epilogue epilogue;
    const void* x;  // dense
    void* out;      // dense; holds v between the passes
    Weight qkv, project;
    // The depthwise convolution reads q, k and v without their bias b. So it reads -b, not 0, outside of the image, and
    // its sums start with b times the sum of the taps, and with its own bias.
    const float* depthwise;  // (heads, 3 * 3 + 1, 3, depth): the taps, and what the sums start with
    const float* outside;    // (heads, 3, depth); nullptr: zeros
    void* packed;            // weights of q, k and v of each head, then the projection's
    int64_t strips;          // parts side by side of an image
    int64_t head_groups;     // heads are computed in so many groups
    int64_t block_shares;    // a block is shared by so many threads in pass 2

    IPT_FAST_INLINE int64_t channels() const { return groups.heads * groups.head_channels; }
    IPT_FAST_INLINE int64_t first_block(int64_t strip) const { return strip * groups.horizontal.blocks() / strips; }
    IPT_FAST_INLINE int64_t first_head(int64_t group) const { return group * groups.heads / head_groups; }

    // Room for the packed weights, whichever the unit.
    IPT_FAST_INLINE int64_t packed_part_bytes() const { return padded(channels()) * groups.depth * 4; }
    IPT_FAST_INLINE int64_t packed_bytes() const {
        return 3 * groups.heads * packed_part_bytes() + padded(channels()) * padded(channels()) * 4;
    }

    // Pixels of a row of the widest strip, with its halo.
    IPT_FAST_INLINE int64_t row_pixels() const {
        int64_t most = 0;
        for (int64_t strip = 0; strip < strips; ++strip) {
            const int64_t columns =
                groups.horizontal.end(first_block(strip + 1) - 1) - groups.horizontal.begin(first_block(strip));
            most = columns > most ? columns : most;
        }
        return most + 2;
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
    // A tile of weighted v, its attended values (in both types of value), and the layer's output.
    IPT_FAST_INLINE int64_t attended_row() const { return padded(channels()) + kChannelPad; }
    IPT_FAST_INLINE int64_t apply_scratch() const {
        return cpu::apply_scratch(groups) + 3 * kTileTokens * attended_row();
    }
};

struct FocalAttentionLayerKernels {
    // Parts begin <= part < end of 3 * heads + 1 of the packed weights.
    void (*pack)(const FocalAttentionLayerParams& params, int64_t begin, int64_t end);
    // Gram matrices, norms and v, for
    // begin <= ((image * head_groups + group) * strips + strip) * blocks down + block < end.
    void (*gram)(const FocalAttentionLayerParams& params, int64_t begin, int64_t end, float* scratch);
    // The output, for begin <= block * block_shares + share < end.
    void (*apply)(const FocalAttentionLayerParams& params, int64_t begin, int64_t end, float* scratch);

    static const FocalAttentionLayerKernels IPT_FAST_COMPILED_LEVELS;
};

}  // namespace ipt_fast::cpu
