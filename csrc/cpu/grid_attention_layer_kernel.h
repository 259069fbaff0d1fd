// Grid attention with a norm and projections around it, framework-free: raw pointers and sizes.
#pragma once

#include "grid_attention_kernel.h"

namespace ipt_fast::cpu {

// x + project(attention(qkv(norm(x)))), in blocks of consecutive groups.
struct GridAttentionLayerParams : GridAttention {
    const void* x;  // (batch, height, width, channels)
    void* out;
    Norm norm;
    Weight qkv, project;  // (3 * channels, channels), (channels, channels)
    void* packed;
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

// Small weights stay in the caches while a group is computed; large ones should serve several groups.
inline int64_t block_groups(const GridAttentionLayerParams& p) {
    const int64_t groups = (channels_of(p) < 128 ? 64 : 256) / most_tokens(p.lattice);
    return groups > 1 ? groups : 1;
}
inline int64_t block_rows(const GridAttentionLayerParams& p) { return block_groups(p) * most_tokens(p.lattice); }
inline int64_t blocks_of_image(const GridAttentionLayerParams& p) {
    return (group_count(p.lattice) + block_groups(p) - 1) / block_groups(p);
}

// Each head's rows of the attended values end in whole vectors, the last head's maybe beyond the padding.
inline int64_t attended_row(const GridAttentionLayerParams& p) { return padded(channels_of(p)) + kChannelPad; }

inline int64_t scratch_size(const GridAttentionLayerParams& p) {
    const int64_t row = 2 * padded(channels_of(p)) + attended_row(p) + 3 * padded(p.depth);
    return block_rows(p) * row + attention_size(p);
}

}  // namespace
}  // namespace ipt_fast::cpu
