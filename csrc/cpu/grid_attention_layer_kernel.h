// Grid attention with a norm and projections around it, framework-free: raw pointers and sizes.
#pragma once

#include "grid_attention_kernel.h"

namespace ipt_fast::cpu {

// x + gate * project(attention(qkv(norm(x)))), in blocks of consecutive groups. Of the biases of q, k and v, that of k
// adds the same to all of a query's scores, which the softmax does not see, and that of v, as weights sum up to 1, the
// same to every result, which belongs to the bias of the projection.
struct GridAttentionLayerParams : GridAttention {
    const void* x;  // (batch, height, width, channels)
    void* out;
    Norm norm;
    Epilogue epilogue;
    const float* q_bias;  // (heads, padded depth); nullptr: there is none
    Weight qkv, project;  // (3 * channels, channels), (channels, channels)
    void* packed;
    int64_t block_groups;  // most groups of a block
};

struct GridAttentionLayerKernels {
    int64_t (*packed_size)(const GridAttentionLayerParams& params);  // bytes
    // Packs weights begin <= k < end.
    void (*pack)(const GridAttentionLayerParams& params, int64_t begin, int64_t end);
    // Blocks begin <= k < end, counted through the batch.
    void (*forward)(const GridAttentionLayerParams& params, int64_t begin, int64_t end, float* scratch);

    static const GridAttentionLayerKernels IPT_FAST_COMPILED_LEVELS;
};

// Internal linkage: code of two levels must never be merged.
namespace {

inline int64_t block_rows(const GridAttentionLayerParams& p) { return p.block_groups * most_tokens(p.lattice); }
inline int64_t blocks_of_image(const GridAttentionLayerParams& p) {
    return (group_count(p.lattice) + p.block_groups - 1) / p.block_groups;
}

// Each head's rows of the attended values end in whole vectors, the last head's maybe beyond the padding.
inline int64_t attended_row(const GridAttentionLayerParams& p) { return padded(channels_of(p)) + kChannelPad; }

inline int64_t scratch_size(const GridAttentionLayerParams& p) {
    const int64_t row = 2 * padded(channels_of(p)) + attended_row(p) + 3 * padded(p.depth);
    return block_rows(p) * row + attention_size(p);
}

}  // namespace
}  // namespace ipt_fast::cpu
