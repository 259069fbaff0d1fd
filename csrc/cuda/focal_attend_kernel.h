// The attention matrices of windows from the sums over their blocks: a matrix to a thread block, a row to a warp.
//
// Reads up to four slots of d (d + 1) fp32 values for each matrix of d^2.
#pragma once

#include "focal_tile_kernel.h"

namespace ipt_fast {

constexpr int kAttendThreads = 128;
constexpr int kAttendDepth = 2 * kWarp;  // most channels of a head: two columns of a row to a lane

// The sums of value(slot, n), n < N, over the blocks of a window, in their order. A thread asks for four blocks' values
// before it adds them.
template <int N, class Value>
IPT_FAST_DEVICE void sum_slots(float (&sums)[N], const FocalLayerParams& p, const int64_t (&first)[4], int64_t step,
                               Value value) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
        sums[n] = 0;
    }
#pragma unroll 1
    for (int split = 0; split < p.splits; ++split) {
        float values[4][N];
#pragma unroll
        for (int i = 0; i < 4 * N; ++i) {
            const int64_t at = first[i / N] + split * step;
            values[i / N][i % N] = first[i / N] >= 0 ? value(p.slots + at, i % N) : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < 4 * N; ++i) {
            sums[i % N] += values[i / N][i % N];
        }
    }
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
    const auto value = [&](const float* row, int j) { return lane + j * kWarp < d ? row[lane + j * kWarp] : 0.0f; };
    float k_norm[2];
    sum_slots(k_norm, p, first, step, [&](const float* slot, int j) { return value(slot + norms + d, j); });
    k_norm[0] = inverse_norm(k_norm[0]);
    k_norm[1] = inverse_norm(k_norm[1]);
    T* to = static_cast<T*>(p.attention) + block_index() * d * d;
#pragma unroll 1
    for (int row = warp_index(); row < d; row += kAttendThreads / kWarp) {
        float sums[3];  // of the lane's products, and q's squared norm
        sum_slots(sums, p, first, step, [&](const float* slot, int n) {
            return n == 2 ? slot[norms + row] : value(slot + (branch * d + row) * d, n);
        });
        const float q_norm = inverse_norm(sums[2]);
        float values[2], most = -INFINITY;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const int column = lane + j * kWarp;
            values[j] = -INFINITY;
            if (column < d) {
                const float product = sums[j];
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
