// x + project(attention(qkv(norm(x)))) on dilated lattices, in one kernel.
#pragma once

#include <stdint.h>

#include "common/token_groups.h"

namespace ipt_fast::cuda {

// Lattices of a map in 32 bits, as a division of 64 is a long function on a GPU: cubby_rows x cubby_columns groups an
// image, the first of which, the largest, has rows x columns points.
struct Lattices {
    int64_t pixels;  // of an image
    int height, width, cubby_rows, cubby_columns, rows, columns;
};

inline Lattices lattices_of(int64_t height, int64_t width, int64_t grid) {
    const TokenAxis down = TokenAxis::lattices(height, grid), across = TokenAxis::lattices(width, grid);
    return {height * width,     (int)height,    (int)width,      (int)down.groups,
            (int)across.groups, (int)down.most, (int)across.most};
}

struct GridAttentionLayerArguments {
    const void *x, *qkv_weight, *project_weight;  // channels-last; (3C, C); (C, C)
    const void *norm_weight, *norm_bias, *table;  // the last two may be absent
    void* out;
    Lattices lattices;
    int64_t grid;
    int groups;  // of all images
    int blocks;  // set by the launcher
    float eps;
    bool narrow;  // the norm's parameters and the table are of T, else float
    bool centered, tf32;
};

constexpr int kMostLatticePoints = 16;  // in a row or column of a group

// `channels` is 32, 48, 64 or 96, channels / heads 32 or 48.
template <class T>
void grid_attention_layer(GridAttentionLayerArguments arguments, int channels, int heads, void* stream);

}  // namespace ipt_fast::cuda
