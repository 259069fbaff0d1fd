// The attention matrices of windows from the sums over their blocks: a matrix to a thread block, a row to a warp.
//
// Reads up to four slots of d (d + 1) fp32 values for each matrix of d^2.
#pragma once

#include "focal_tile_kernel.h"

namespace ipt_fast {

constexpr int kAttendThreads = 128;
constexpr int kAttendDepth = 2 * kWarp;  // most channels of a head: two columns of a row to a lane

// The sum of value(slot) over the blocks of a window, in their order.
template <class Value>
IPT_FAST_DEVICE float sum_of_slots(const FocalLayerParams& p, const int64_t (&first)[4], int64_t step, Value value) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (first[i] >= 0) {
#pragma unroll 1
            for (int split = 0; split < p.splits; ++split) {
                sum += value(p.slots + first[i] + split * step);
            }
        }
    }
    return sum;
}

// 0 where the square overflows: the normalised values are then zeros, as in PyTorch.
IPT_FAST_DEVICE float inverse_norm(float square) {
    const float norm = sqrtf(square);
    return 1.0f / (norm > 1e-12f ? norm : 1e-12f);
}

template <class T>
IPT_FAST_KERNEL IPT_FAST_BOUNDS(kAttendThreads, 6) focal_attend_kernel(IPT_FAST_PARAMS(FocalLayerParams) p) {
    const int d = p.channels / p.heads;
    const int matrix = (int)block_index(), branch = matrix % 2, head = matrix / 2 % p.heads;
    const int window = matrix / 2 / p.heads, across = window % p.horizontal.windows;
    const int down = window / p.horizontal.windows % p.vertical.windows;
    const int image = window / p.horizontal.windows / p.vertical.windows;
    const int64_t step = (int64_t)p.heads * focal_slot(d);
    int64_t first[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int y = p.vertical.block_of(branch, down, i / 2), x = p.horizontal.block_of(branch, across, i % 2);
        const bool there =
            i / 2 < p.vertical.parts && i % 2 < p.horizontal.parts && y < p.vertical.blocks && x < p.horizontal.blocks;
        const int64_t block = ((int64_t)image * p.vertical.blocks + y) * p.horizontal.blocks + x;
        first[i] = there ? block * p.splits * step + (int64_t)head * focal_slot(d) : -1;
    }
    const int norms = 2 * d * (d + branch), lane = lane_index();
    const float temperature = small_value<T>(p.temperature, head, p.narrow);
    float k_norm[2] = {};
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        const int column = lane + j * kWarp;
        if (column < d) {
            k_norm[j] =
                inverse_norm(sum_of_slots(p, first, step, [&](const float* slot) { return slot[norms + d + column]; }));
        }
    }
    T* to = static_cast<T*>(p.attention) + block_index() * d * d;
#pragma unroll 1
    for (int row = warp_index(); row < d; row += kAttendThreads / kWarp) {
        const float q_norm =
            inverse_norm(sum_of_slots(p, first, step, [&](const float* slot) { return slot[norms + row]; }));
        float values[2], most = -INFINITY;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const int column = lane + j * kWarp;
            values[j] = -INFINITY;
            if (column < d) {
                const float product = sum_of_slots(
                    p, first, step, [&](const float* slot) { return slot[(branch * d + row) * d + column]; });
                // By rounding, the product may overflow where the norms do not.
                const float most_product = 3.4e38f, bounded = product > most_product    ? most_product
                                                              : product < -most_product ? -most_product
                                                                                        : product;
                const bool zero = q_norm == 0 || k_norm[j] == 0;
                values[j] = zero ? 0.0f : bounded * q_norm * k_norm[j] / temperature;
            }
            most = values[j] > most ? values[j] : most;
        }
#pragma unroll
        for (int mask = kWarp / 2; mask > 0; mask /= 2) {
            const float other = shuffle_xor(most, mask);
            most = other > most ? other : most;
        }
        values[0] = expf(values[0] - most);
        values[1] = expf(values[1] - most);
        float sum = values[0] + values[1];
#pragma unroll
        for (int mask = kWarp / 2; mask > 0; mask /= 2) {
            sum += shuffle_xor(sum, mask);
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const int column = lane + j * kWarp;
            if (column < d) {
                to[row * d + column] = from_float<T>(values[j] / sum);
            }
        }
    }
}

}  // namespace ipt_fast
