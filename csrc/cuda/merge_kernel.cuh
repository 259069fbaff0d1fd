// A block makes 64 x 32 values of a product, or 1024 of a depthwise sum. The weights are a few hundred kilobytes.
#pragma once

#include "merge.cuh"
#include "warp_tiles.cuh"

namespace ipt_fast::cuda {

template <class T>
struct MergeShared {
    static constexpr int kStride = padded_row<T>(kMergeInner);
    alignas(16) T a[kMergeRows * kStride];
    alignas(16) T b[kMergeColumns * kStride];
};

// to[i * stride + k] = from[i * outer + k * inner] of `rows` x kMergeInner values, zeros beyond the limits.
template <class T>
IPT_FAST_DEVICE void load_strided(T* to, int stride, int rows, const T* from, int64_t outer, int64_t inner, int limit,
                                  int inner_limit) {
    for (int n = thread_index(); n < rows * kMergeInner; n += kMergeThreads) {
        // Neighbouring threads read neighbouring values.
        const int i = inner == 1 ? n / kMergeInner : n % rows, k = inner == 1 ? n % kMergeInner : n / rows;
        const bool there = i < limit && k < inner_limit;
        to[i * stride + k] = there ? from[i * outer + k * inner] : from_float<T>(0);
    }
}

template <class T>
IPT_FAST_DEVICE void make_product(const Product& p, int block, bool tf32) {
    auto& shared = *shared_memory<MergeShared<T>>();
    constexpr int stride = MergeShared<T>::kStride;
    const int across = (p.columns + kMergeColumns - 1) / kMergeColumns;
    const int row = block / across * kMergeRows, column = block % across * kMergeColumns;
    const T* a = static_cast<const T*>(p.a) + row * p.a_row;
    const T* b = static_cast<const T*>(p.b) + column * p.b_column;
    WarpSums<16, kMergeColumns> sums;
    sums.clear();
    for (int k = 0; k < p.inner; k += kMergeInner) {
        sync_block();
        load_strided(shared.a, stride, kMergeRows, a + k * p.a_column, p.a_row, p.a_column, p.rows - row, p.inner - k);
        load_strided(shared.b, stride, kMergeColumns, b + k * p.b_row, p.b_column, p.b_row, p.columns - column,
                     p.inner - k);
        sync_block();
        multiply<T, kMergeInner>(sums, shared.a + warp_index() * 16 * stride, stride, shared.b, stride, tf32);
    }
    T* y = static_cast<T*>(p.y);
    sums.for_pairs([&](int i, int j, const float* pair) {
        const int64_t to = row + warp_index() * 16 + i;
        for (int v = 0; v < 2; ++v) {
            if (to < p.rows && column + j + v < p.columns) {
                y[to * p.columns + column + j + v] = from_float<T>(pair[v]);
            }
        }
    });
}

template <class T>
IPT_FAST_DEVICE void make_sum(const DepthwiseSum& s, int block) {
    T *sum = static_cast<T*>(s.sum), *k5 = static_cast<T*>(s.k5);
    T *k3 = static_cast<T*>(s.k3), *k1 = static_cast<T*>(s.k1);
    for (int n = thread_index(); n < kMergeValues; n += kMergeThreads) {
        const int64_t i = (int64_t)block * kMergeValues + n;
        if (i >= (int64_t)s.channels * 25) {
            return;
        }
        const int64_t channel = i / 25;
        const int tap = (int)(i % 25), y = tap / 5 - 1, x = tap % 5 - 1;
        const bool in_3 = y >= 0 && y < 3 && x >= 0 && x < 3, in_1 = tap == 12;
        const int64_t i_3 = channel * 9 + y * 3 + x;
        if (s.backward) {
            k5[i] = sum[i];
            if (in_3) {
                k3[i_3] = sum[i];
            }
            if (in_1) {
                k1[channel] = sum[i];
            }
        } else {
            float value = to_float(k5[i]);
            if (in_3) {
                value += to_float(k3[i_3]);
            }
            if (in_1) {
                value += to_float(k1[channel]) + (s.identity ? 1.0f : 0.0f);
            }
            sum[i] = from_float<T>(value);
        }
    }
}

template <class T>
IPT_FAST_KERNEL IPT_FAST_BOUNDS(kMergeThreads, 4) merge_kernel(IPT_FAST_ARGUMENTS(MergeArguments) p) {
    int block = (int)block_index();
#pragma unroll
    for (int i = 0; i < kMergeProducts; ++i) {
        const int blocks = (int)blocks_of(p.products[i]);
        if (block >= 0 && block < blocks) {
            make_product<T>(p.products[i], block, p.tf32);
        }
        block -= blocks;
    }
    if (block >= 0) {
        make_sum<T>(p.sum, block);
    }
}

}  // namespace ipt_fast::cuda
