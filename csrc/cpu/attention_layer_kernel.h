// Attention inside groups of pixels with a norm and projections around it, framework-free: raw pointers and sizes.
#pragma once

#include "group_attention_kernel.h"

namespace ipt_fast::cpu {

// x + gate * project(attention(qkv(norm(x)))), in blocks of consecutive groups. Of the biases of q, k and v, that of k
// adds the same to all of a query's scores, which the softmax does not see, and that of v, as weights sum up to 1, the
// same to every result, which belongs to the bias of the projection.
struct AttentionLayerParams : GroupAttention {
    const void* x;  // (batch, height, width, channels)
    void* out;
    Norm norm;
    Epilogue epilogue;
    bool residual;              // whether x is added
    const float* q_bias;        // (channels); nullptr: there is none
    const void *qkv, *project;  // dense weights in `dtype`, (3 * channels, channels) and (channels, channels)
    void* packed;
    int64_t block_groups;  // most groups of a block
};

struct AttentionLayerKernels {
    int64_t (*packed_size)(const AttentionLayerParams& params);  // bytes
    // Packs rows begin <= k < end of both weights, one behind the other.
    void (*pack)(const AttentionLayerParams& params, int64_t begin, int64_t end);
    // Blocks begin <= k < end, counted through the batch.
    void (*forward)(const AttentionLayerParams& params, int64_t begin, int64_t end, float* scratch);

    static const AttentionLayerKernels IPT_FAST_COMPILED_LEVELS;
};

// Internal linkage: code of two levels must never be merged.
namespace {

// Columns of a block: each group's tokens end in whole vectors.
inline int64_t block_columns(const AttentionLayerParams& p) { return p.block_groups * padded(p.queries.most()); }
inline int64_t blocks_of_image(const AttentionLayerParams& p) {
    return (p.queries.count() + p.block_groups - 1) / p.block_groups;
}

// Values between two rows of so many columns, so that the same columns of many rows find room in a cache.
inline int64_t spread(int64_t columns) { return columns % 64 == 0 && columns > 64 ? columns + kChannelPad : columns; }

inline int64_t scratch_size(const AttentionLayerParams& p) {
    const int64_t columns = block_columns(p), row = spread(columns);
    return 2 * columns + 4 * channels_of(p) * row + packed_floats(p.dtype, p.brgemm, columns, channels_of(p)) +
           attention_size(p);
}

}  // namespace
}  // namespace ipt_fast::cpu
