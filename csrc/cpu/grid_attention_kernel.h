// Attention on dilated lattices and its gradient, framework-free: raw pointers and sizes.
#pragma once

#include "common/lattice.h"
#include "kernels.h"

namespace ipt_fast::cpu {

constexpr float kLog2E = 0x1.715476p0f;  // scores are computed times this

// What the operator, its gradient and the layer have in common.
struct GridAttention {
    DType dtype;  // of all maps
    Brgemm brgemm;
    Lattice lattice;
    int64_t batch, heads, depth;  // depth: channels of a head
    float scale;                  // of the scores
    // For each head, a matrix [bias_rows()][bias_row()] of biases times kLog2E. The bias of a query that lies a rows
    // and b columns after its key is in row a + grid - 1 and column b + grid - 1, so those of a row of queries lie side
    // by side. What is left of the matrix is zeros.
    const float* bias;
};

struct GridAttentionParams : GridAttention {
    const void* qkv;  // (batch, height, width, 3 * channels)
    void* out;        // (batch, height, width, channels)
};

struct GridAttentionGradients : GridAttention {
    const void* qkv;   // (batch, height, width, 3 * channels)
    const void* grad;  // (batch, height, width, channels), of the output
    void* grad_qkv;
};

struct GridAttentionKernels {
    // Items begin <= k < end: head k % heads of group k / heads, counted through the batch.
    void (*forward)(const GridAttentionParams& params, int64_t begin, int64_t end, float* scratch);
    // Groups begin <= k < end, counted through the batch, of one head; adds to the gradient of the head's bias.
    void (*backward)(const GridAttentionGradients& params, int64_t head, int64_t begin, int64_t end, float* scratch,
                     double* grad_bias);

    static const GridAttentionKernels IPT_FAST_COMPILED_LEVELS;
};

// Internal linkage: code of two levels must never be merged.
namespace {

// Queries are taken in chunks, whose scores stay in the caches; a multiple of kChannelPad.
constexpr int64_t kChunk = 64;

// No group of a lattice has more tokens.
inline int64_t most_tokens(const Lattice& l) { return group_of(l, 0).tokens(); }

inline int64_t channels_of(const GridAttention& p) { return p.heads * p.depth; }

inline int64_t bias_rows(const GridAttention& p) { return 2 * p.lattice.grid - 1; }
inline int64_t bias_row(const GridAttention& p) { return 2 * p.lattice.grid + kChannelPad; }
inline int64_t bias_size(const GridAttention& p) { return bias_rows(p) * bias_row(p); }

// Floats of scratch: for the scores of a chunk of queries, for a chunk's rows and for all rows of one head of a group.
inline int64_t scores_size(const GridAttention& p) { return kChunk * most_tokens(p.lattice); }
inline int64_t chunk_size(const GridAttention& p) { return kChunk * padded(p.depth); }
inline int64_t head_size(const GridAttention& p) { return most_tokens(p.lattice) * padded(p.depth); }

// Room for an operand made of a head's rows, and of a chunk's scores.
inline int64_t head_room(const GridAttention& p) { return padded(most_tokens(p.lattice)) * padded(p.depth); }
inline int64_t scores_room(const GridAttention& p) { return padded(most_tokens(p.lattice)) * kChunk; }

// What `attend` needs.
inline int64_t attention_size(const GridAttention& p) {
    return scores_size(p) + 3 * chunk_size(p) + 2 * head_room(p) + scores_room(p);
}

inline int64_t scratch_size(const GridAttentionParams& p) { return 3 * head_size(p) + attention_size(p); }
inline int64_t scratch_size(const GridAttentionGradients& p) {
    return 6 * head_size(p) + 2 * scores_size(p) + 6 * chunk_size(p) + bias_size(p) + 3 * head_room(p) + scores_room(p);
}

}  // namespace
}  // namespace ipt_fast::cpu
