// x + project(attention(qkv(norm(x)))) on dilated lattices, in one kernel.
#pragma once

#include <stdint.h>

#include "lattice_attention.h"

namespace ipt_fast {

struct GridAttentionLayerParams {
    const void *x, *qkv_weight, *project_weight;   // channels-last; (3C, C); (C, C)
    const float *norm_weight, *norm_bias, *table;  // the last two may be absent
    void* out;
    Lattices lattices;
    int64_t grid;
    int groups;  // of all images
    int blocks;  // set by the launcher
    float eps;
    bool centered, tf32;
};

constexpr int kMostLatticePoints = 16;  // in a row or column of a group

// `channels` is 32, 48, 64 or 96, channels / heads 32 or 48.
template <class T>
void grid_attention_layer(GridAttentionLayerParams params, int channels, int heads, void* stream);

}  // namespace ipt_fast
