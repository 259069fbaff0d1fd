// Attention inside groups of pixels and its gradient, framework-free: raw pointers and sizes.
#pragma once

#include "common/token_groups.h"
#include "kernels.h"

namespace ipt_fast::cpu {

constexpr float kLog2E = 0x1.715476p0f;  // scores are computed times this

// Queries are taken in chunks, and a chunk's keys in blocks, whose scores stay in the first cache; multiples of
// kChannelPad.
constexpr int64_t kChunk = 64, kKeyBlock = 128;

// The groups of a map: those of its rows times those of its columns, in raster order, so that the pixels of consecutive
// groups lie side by side.
struct TokenGroups {
    TokenAxis vertical, horizontal;
    bool whole;       // what a group would have beyond the border is part of it, as a pixel of zeros
    bool transposed;  // rows are the map's columns

    IPT_FAST_INLINE int64_t count() const { return vertical.groups * horizontal.groups; }
    IPT_FAST_INLINE int64_t pixels() const { return vertical.size * horizontal.size; }
    // No group has more tokens.
    IPT_FAST_INLINE int64_t most() const { return most_of(vertical) * most_of(horizontal); }

  private:
    IPT_FAST_INLINE int64_t most_of(const TokenAxis& axis) const {
        return whole || axis.most < axis.size ? axis.most : axis.size;
    }
};

// What is added to the scores, times kLog2E. In its window, or on its lattice, a query lies in row a and column b and a
// key in row c and column d: theirs is at first + a * query_row + b + c * key_row + d * key_column of the `size` values
// of a head. Neighbours of a query's, up to kChannelPad, may be read, too.
struct ScoreBiases {
    const float* values;  // nullptr: there are none
    int64_t size, first;
    int64_t query_row, key_row, key_column;
};

// What the operators, their gradients and the layers have in common.
struct GroupAttention {
    DType dtype;  // of all maps
    Brgemm brgemm;
    TokenGroups queries, keys;
    int64_t batch, heads, depth;  // depth: channels of a head
    float scale;                  // of the scores
    const float* temperature;     // of each head, in place of the scale: q and k are normalised; nullptr: they are not
    ScoreBiases bias;
};

struct GroupAttentionParams : GroupAttention {
    Pixels q, k, v;
    void* out;  // dense
};

// Where windows of keys overlap, the gradients of k and v are those of each window's keys: (batch, groups, keys,
// channels) in fp32, else dense maps, or parts of one.
struct GroupAttentionGradients : GroupAttention {
    Pixels q, k, v, grad;
    bool of_windows;
    void *grad_q, *grad_k, *grad_v;
    int64_t grad_step;  // values between their pixels
};

struct GroupAttentionKernels {
    // Items begin <= k < end: head k % heads of group k / heads, counted through the batch.
    void (*forward)(const GroupAttentionParams& params, int64_t begin, int64_t end, float* scratch);

    static const GroupAttentionKernels IPT_FAST_COMPILED_LEVELS;
};

// Sums over groups: the gradients of the biases, where these lie (nullptr: there are none), and of the temperatures, of
// one head after the other.
struct GroupAttentionSums {
    double *bias, *temperature;
};

struct GroupAttentionBackwardKernels {
    // Adds those of the groups begin <= k < end, counted through the batch, to the sums.
    void (*backward)(const GroupAttentionGradients& params, int64_t begin, int64_t end, float* scratch,
                     GroupAttentionSums sums);

    static const GroupAttentionBackwardKernels IPT_FAST_COMPILED_LEVELS;
};

// Internal linkage: code of two levels must never be merged.
namespace {

inline int64_t channels_of(const GroupAttention& p) { return p.heads * p.depth; }

// Heads whose pixels are gathered at once: narrow ones fill vectors together.
inline int64_t heads_at_once(const GroupAttention& p) { return p.depth < kChannelPad ? 2 * kChannelPad / p.depth : 1; }

// Floats of a list of a group's pixels.
inline int64_t list_size(const TokenGroups& groups) { return 2 * padded(groups.most()); }

// Floats of a chunk's scores, and of operands made of them and of a head's rows.
inline int64_t scores_size(const GroupAttention& p) { return p.keys.most() * kChunk; }
inline int64_t scores_room(const GroupAttention& p) { return padded(p.keys.most()) * kChunk; }
inline int64_t chunk_size(const GroupAttention& p) { return kChunk * padded(p.depth); }
inline int64_t queries_size(const GroupAttention& p) { return padded(p.queries.most()) * padded(p.depth); }
inline int64_t keys_size(const GroupAttention& p) { return padded(p.keys.most()) * padded(p.depth); }

// Floats of the rows of heads that are gathered at once.
inline int64_t gathered_size(const GroupAttention& p, const TokenGroups& groups) {
    return padded(groups.most()) * padded(heads_at_once(p) * p.depth);
}

// What `attend` needs.
inline int64_t attention_size(const GroupAttention& p) {
    return 3 * kChunk * kKeyBlock + 2 * chunk_size(p) + 2 * keys_size(p);
}

inline int64_t scratch_size(const GroupAttentionParams& p) {
    return list_size(p.queries) + list_size(p.keys) + gathered_size(p, p.queries) + 2 * gathered_size(p, p.keys) +
           attention_size(p);
}

inline int64_t scratch_size(const GroupAttentionGradients& p) {
    return list_size(p.queries) + list_size(p.keys) + 2 * queries_size(p) + 4 * keys_size(p) + 2 * scores_size(p) +
           6 * chunk_size(p) + p.bias.size + 3 * keys_size(p) + scores_room(p) + 2 * padded(p.queries.most()) +
           2 * padded(p.keys.most());
}

}  // namespace
}  // namespace ipt_fast::cpu
