// x + PW(attention(DW3x3(PW(norm(x))))) with focal channel attention, forward, framework-free.
//
// Three kernels: the Gram matrices of q and k, the attention matrices, their product with v and all that follows. Each
// of the outer two makes its part of the convolved projection from x; a map of 3 C channels is never in memory.
#pragma once

#include <stdint.h>

#include "common/marks.h"

namespace ipt_fast::cuda {

// An axis of the map in blocks: Axis of windows.h for two branches, in numbers that fit 32 bits.
struct FocalAxis {
    int size, window;     // pixels
    int part, parts;      // of a window, see Axis
    int windows, blocks;  // of the map

    IPT_FAST_BOTH int begin(int block) const {
        return parts == 1 ? block * window : block / 2 * window + block % 2 * part;
    }
    IPT_FAST_BOTH int end(int block) const {
        const int64_t next = parts == 1 ? (int64_t)(block + 1) * window : (int64_t)begin(block) + next_part(block);
        return next < size ? (int)next : size;
    }
    // Where a block begins in its window.
    IPT_FAST_BOTH int position(int branch, int block) const {
        return parts == 1 ? 0 : branch == 0 ? block % 2 * part : (1 - block % 2) * (window - part);
    }
    IPT_FAST_BOTH int window_of(int branch, int block) const {
        if (parts == 1) {
            return block;
        }
        return branch == 0 ? block / 2 : (block == 0 ? windows : (block + 1) / 2) - 1;
    }
    // Part `index` of a window; it may lie outside of the map, at or after `blocks`.
    IPT_FAST_BOTH int block_of(int branch, int window_index, int index) const {
        return (window_index * parts + branch * (parts - 1) + index) % (windows * parts);
    }

  private:
    IPT_FAST_BOTH int next_part(int block) const { return block % 2 == 0 ? part : window - part; }
};

struct FocalAttentionLayerArguments {
    const void *x, *qkv_weight, *depthwise_weight, *project_weight;
    const void *norm_weight, *norm_bias;  // the bias may be null
    const void *temperature, *token_weight, *top_weight, *bottom_weight;
    void* out;
    float* slots;     // (images, blocks, splits, heads, focal_slot)
    void* attention;  // (images, windows, heads, branches, head channels, head channels)
    int images, height, width, channels, heads;
    FocalAxis vertical, horizontal;
    int splits;  // thread blocks that share a block of the map
    float eps;
    bool narrow;  // the parameters from norm_weight to bottom_weight are of T, else float
    bool centered, tf32;
};

// Two products of q and k, then for each the squared norms of q's channels and of k's.
IPT_FAST_BOTH constexpr int focal_slot(int depth) { return 2 * depth * (depth + 2); }

inline int64_t focal_blocks(const FocalAttentionLayerArguments& p) {
    return (int64_t)p.images * p.vertical.blocks * p.horizontal.blocks * p.splits;
}
inline int64_t focal_matrices(const FocalAttentionLayerArguments& p) {
    return (int64_t)p.images * p.vertical.windows * p.horizontal.windows * p.heads * 2;
}

// Whether there are kernels for heads of `depth` channels.
constexpr bool focal_layer_takes(int64_t channels, int64_t depth) {
    return (depth == 32 && (channels == 32 || channels == 64 || channels == 96)) ||
           (depth == 48 && (channels == 48 || channels == 96));
}

template <class T>
void focal_attention_layer(const FocalAttentionLayerArguments& arguments, void* stream);

}  // namespace ipt_fast::cuda
