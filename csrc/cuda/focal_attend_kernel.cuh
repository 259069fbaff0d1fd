// The attention matrices of windows from the sums over their blocks: a matrix to a thread block, rows to its warps.
//
// Reads up to four slots of d (d + 1) fp32 values for each matrix of d^2.
#pragma once

#include "focal_tile.cuh"

namespace ipt_fast::cuda {

constexpr int kAttendThreads = 128, kAttendWarps = kAttendThreads / kWarp;
constexpr int kAttendRows = 2;  // that a warp has under way

// The slots of a window's blocks, the first of each: nullptr where the map has no such block, the others `step` apart.
struct WindowSlots {
    const float* first[4];
    int64_t step;
    int count;

    // The sums of value(slot, n), n < N, in the blocks' order. A thread asks for four blocks' before it adds them.
    template <int N, class Value>
    IPT_FAST_DEVICE void sum(float (&sums)[N], Value value) const {
#pragma unroll
        for (int n = 0; n < N; ++n) {
            sums[n] = 0;
        }
#pragma unroll 1
        for (int split = 0; split < count; ++split) {
            float values[4][N];
#pragma unroll
            for (int i = 0; i < 4 * N; ++i) {
                const float* slot = first[i / N];
                values[i / N][i % N] = slot == nullptr ? 0.0f : value(slot + split * step, i % N);
            }
#pragma unroll
            for (int i = 0; i < 4 * N; ++i) {
                sums[i % N] += values[i / N][i % N];
            }
        }
    }
};

// 0 where the square overflows: the normalised values are then zeros, as in PyTorch.
IPT_FAST_DEVICE float inverse_norm(float square) {
    const float norm = sqrtf(square);
    return 1.0f / (norm > 1e-12f ? norm : 1e-12f);
}

// softmax(products q_norm k_norm factor) of a row, two columns a lane, of which the second may not be there.
template <class T>
IPT_FAST_DEVICE void attend_row(T* to, const float* products, float q_norm, const float* k_norm, float factor,
                                bool second) {
    float values[2], most = -INFINITY;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        const float product = products[j];
        // By rounding, the product may overflow where the norms do not.
        const float most_product = 3.4e38f, bounded = product > most_product    ? most_product
                                                      : product < -most_product ? -most_product
                                                                                : product;
        const bool zero = q_norm == 0 || k_norm[j] == 0;
        values[j] = zero ? 0.0f : bounded * q_norm * k_norm[j] * factor;
        values[j] = j == 0 || second ? values[j] : -INFINITY;
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
    const float share = reciprocal(sum);
    to[0] = from_float<T>(values[0] * share);
    if (second) {
        to[kWarp] = from_float<T>(values[1] * share);
    }
}

template <class T>
IPT_FAST_KERNEL IPT_FAST_BOUNDS(kAttendThreads, 8)
    focal_attend_kernel(IPT_FAST_ARGUMENTS(FocalAttentionLayerArguments) p) {
    const int d = p.channels / p.heads;
    const int matrix = (int)block_index(), branch = matrix % 2, head = matrix / 2 % p.heads;
    const int window = matrix / 2 / p.heads, across = window % p.horizontal.windows;
    const int down = window / p.horizontal.windows % p.vertical.windows;
    const int image = window / p.horizontal.windows / p.vertical.windows;
    WindowSlots slots;
    slots.step = (int64_t)p.heads * focal_slot(d);
    slots.count = p.splits;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int y = p.vertical.block_of(branch, down, i / 2), x = p.horizontal.block_of(branch, across, i % 2);
        const bool there =
            i / 2 < p.vertical.parts && i % 2 < p.horizontal.parts && y < p.vertical.blocks && x < p.horizontal.blocks;
        const int64_t block = ((int64_t)image * p.vertical.blocks + y) * p.horizontal.blocks + x;
        const int64_t first = block * p.splits * slots.step + (int64_t)head * focal_slot(d);
        slots.first[i] = there ? p.slots + first : nullptr;
    }
    const int norms = 2 * d * (d + branch), lane = lane_index();
    const int rows = d / kAttendWarps, own = warp_index() * rows;
    const bool second = lane + kWarp < d;
    // Of the lane's columns, and of row `lane` of the warp's.
    float inverse[3];
    slots.sum(inverse, [&](const float* slot, int n) {
        if (n == 2) {
            return lane < rows ? slot[norms + own + lane] : 0.0f;
        }
        return n == 0 || second ? slot[norms + d + lane + n * kWarp] : 0.0f;
    });
#pragma unroll
    for (int n = 0; n < 3; ++n) {
        inverse[n] = inverse_norm(inverse[n]);
    }
    const float factor = 1.0f / small_value<T>(p.temperature, head, p.narrow);
    T* to = static_cast<T*>(p.attention) + block_index() * d * d;
#pragma unroll 1
    for (int row = 0; row < rows; row += kAttendRows) {  // d is a multiple of 16
        float products[2 * kAttendRows];
        slots.sum(products, [&](const float* slot, int n) {
            const float* at = slot + (branch * d + own + row + n / 2) * d + lane;
            return n % 2 == 0 || second ? at[n % 2 * kWarp] : 0.0f;
        });
#pragma unroll
        for (int i = 0; i < kAttendRows; ++i) {
            attend_row(to + (own + row + i) * d + lane, products + 2 * i, shuffle(inverse[2], row + i), inverse, factor,
                       second);
        }
    }
}

}  // namespace ipt_fast::cuda
