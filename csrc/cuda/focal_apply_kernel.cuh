// Pass 2 of the focal attention layer: v, its product with both branches' attention, the projection, the residual.
//
// A block of the map to a thread block, in the tiles of pass 1. For each tile: read x with a border of one pixel,
// normalise it, project it to v in place, convolve (a warp has eight channels of four rows), then 16 tokens to a warp:
// y = top_w (v A0^T) + bottom_w (v A1^T) for each head, in v's place, and the projection of y. The weights of the last
// take the place of the pixels while y is made; x is read again for the residual, from the cache.
//
// Bytes a pixel: x and the result, 2 C T, and x's border and x again from the second level cache. FLOPs a pixel: tensor
// cores 1.5 * 2 C^2 + 4 C d + 2 C^2, vector about 1.5 * 18 C. Shared memory, at C 96, d 48 and 16 bits: pixels 40 KB,
// tokens 27 KB, the weights of v 20 KB, attention 21 KB.
#pragma once

#include "focal_convolve.cuh"
#include "focal_tile.cuh"

namespace ipt_fast::cuda {

constexpr int kApplyThreads = 256;

template <class T, int C, int D>
struct ApplyShared {
    static constexpr int kTokens = focal_tokens<T>(), kStride = padded_row<T>(C), kAttentionStride = padded_row<T>(D);
    static constexpr int kUnit = C == 96 && sizeof(T) == 2 ? 32 : 16;  // rows of pixels that a warp projects at once
    static constexpr int kPixels = focal_pixels<T>(kUnit);
    static constexpr int kTogether = C == 48 ? 1 : 2;  // vectors that a thread reads at once, as registers suffice
    static_assert(C <= kPixels && kTokens <= 16 * kApplyThreads / kWarp);

    alignas(16) T pixels[kPixels * kStride];  // then the weights of the projection
    alignas(16) T tokens[kTokens * kStride];
    alignas(16) T weight[C * kStride];
    alignas(16) T attention[2 * C * kAttentionStride];  // (heads, branches, of y, of v)
    FocalNorm<C> norm;
    alignas(16) T taps[9 * C];
    // Not in registers, which are scarce.
    FocalBlock block;
    FocalTile tiles[2];  // this and the next
    int first, last;     // of the tiles
};

template <class T, int C, int D>
IPT_FAST_DEVICE void convolve_values(ApplyShared<T, C, D>& shared, const FocalTile& tile) {
    constexpr int stride = ApplyShared<T, C, D>::kStride, groups = C / kConvolvedChannels;
    const int columns = tile.columns, strips = (tile.rows + kConvolvedRows - 1) / kConvolvedRows;
#pragma unroll 1
    for (int i = warp_index(); i < strips * groups; i += kApplyThreads / kWarp) {
        const int channel = i % groups * kConvolvedChannels, y0 = i / groups * kConvolvedRows;
        const int rows = tile.rows - y0 < kConvolvedRows ? tile.rows - y0 : kConvolvedRows;
        T* to = shared.tokens + y0 * columns * stride + channel;
        convolve_rows(shared.pixels + y0 * (columns + 2) * stride + channel, stride, columns + 2, columns, rows,
                      shared.taps + channel, C, [&](int y, int x, int c, float first, float second) {
                          store_pair(to + (y * columns + x) * stride + c, first, second);
                      });
    }
}

// y of 16 tokens in the place of their v, collective; weight(head, branch, row) merges the branches of the lane's
// rows 0 and 1 of sums.
template <class T, int C, int D, class Weight>
IPT_FAST_DEVICE void attend_tokens(T* own, const T* attention, bool tf32, Weight weight) {
    constexpr int stride = ApplyShared<T, C, D>::kStride, a_stride = ApplyShared<T, C, D>::kAttentionStride;
#pragma unroll 1
    for (int head = 0; head < C / D; ++head) {
        T* values = own + head * D;
        float weights[2][2];
#pragma unroll
        for (int v = 0; v < 4; ++v) {
            weights[v / 2][v % 2] = weight(head, v / 2, v % 2);
        }
        WarpSums<16, D> top, bottom;
        top.clear();
        bottom.clear();
        const T* matrix = attention + head * 2 * D * a_stride;
#pragma unroll 1
        for (int k = 0; k < D; k += depth<T>()) {
            const BlockA v = load_a(values + k, stride);
#pragma unroll
            for (int j = 0; j < D / 16; ++j) {
                const T* b = matrix + j * 16 * a_stride + k;
                multiply_add<T>(top.values[0][j], v, load_b(b, a_stride), tf32);
                multiply_add<T>(bottom.values[0][j], v, load_b(b + D * a_stride, a_stride), tf32);
            }
        }
#pragma unroll
        for (int j = 0; j < D / 16; ++j) {
#pragma unroll
            for (int v = 0; v < 8; ++v) {
                float& y = top.values[0][j][v / 4][v % 4];
                const int row = v % 4 / 2;
                y = y * weights[0][row] + bottom.values[0][j][v / 4][v % 4] * weights[1][row];
            }
        }
        sync_warp();
        top.for_pairs([&](int i, int j, const float* pair) { store_pair(values + i * stride + j, pair[0], pair[1]); });
    }
    sync_warp();
}

template <class T, int C, int D>
IPT_FAST_KERNEL IPT_FAST_BOUNDS(kApplyThreads, sizeof(T) == 4 ? 1
                                               : C > 48       ? 2
                                                              : 3)
    focal_apply_kernel(IPT_FAST_ARGUMENTS(FocalAttentionLayerArguments) p) {
    using S = ApplyShared<T, C, D>;
    constexpr int vectors = C / Vector<T>::kValues;
    S& shared = *shared_memory<S>();
    const int rest = (int)block_index();
    const FocalBlock& block = shared.block;
    if (thread_index() == 0) {
        shared.block = FocalBlock::at(p, rest / p.splits, focal_rows<T>());
        shared.first = block.first(rest % p.splits, p.splits);
        shared.last = block.first(rest % p.splits + 1, p.splits);
        shared.tiles[shared.first % 2] = FocalTile::at(block, shared.first);
    }
    sync_block();
    const T* weight = static_cast<const T*>(p.qkv_weight) + 2 * C * C;
    copy_rows(shared.weight, S::kStride, C, C, [&](int row) { return weight + row * C; });
    const T* attention = static_cast<const T*>(p.attention);
    const T* matrices[2] = {attention + block.matrix(p, 0) * D * D, attention + block.matrix(p, 1) * D * D};
    copy_rows(shared.attention, S::kAttentionStride, 2 * C, D,
              [&](int row) { return (row / D % 2 == 0 ? matrices[0] : matrices[1]) + row * D; });
    if (shared.first < shared.last) {
        copy_pixels<T, C>(shared.pixels, S::kStride, p, block.image, shared.tiles[shared.first % 2]);
    }
    copy_commit();
    load_small<T, C, C, kApplyThreads>(p, shared.norm, shared.taps, [](int i) { return 2 * C + i; });
    copy_wait<0>();
    sync_block();

    const int window = p.vertical.window, own_first = warp_index() * 16;
    const T* project = static_cast<const T*>(p.project_weight);
#pragma unroll 1
    for (int index = shared.first; index < shared.last; ++index) {
        const FocalTile& tile = shared.tiles[index % 2];
        copy_wait<0>();
        normalise_pixels<T, C, 3>(shared.pixels, S::kStride, p, tile, shared.norm);
        sync_block();
        project_in_place<T, C, C, S::kUnit>(shared.pixels, S::kStride, tile.pixels(), shared.weight, S::kStride,
                                            p.tf32);
        sync_block();
        convolve_values(shared, tile);
        sync_block();
        copy_rows(shared.pixels, S::kStride, C, C, [&](int row) { return project + row * C; });
        copy_commit();
        const int tokens = tile.tokens();
        const bool busy = own_first < tokens;  // of the warp
        const Divisor columns(tile.columns);
        T* own = shared.tokens + own_first * S::kStride;
        if (busy) {
            int at[2];  // of the two tokens of the lane's sums in the window's weights
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int wanted = own_first + lane_index() / 4 + i * 8, token = wanted < tokens ? wanted : tokens - 1;
                const int y = columns.quotient(token), x = token - y * columns.n;
                at[i] = (p.vertical.position(0, block.down) + tile.top + y) * window +
                        p.horizontal.position(0, block.across) + tile.left + x;
            }
            attend_tokens<T, C, D>(own, shared.attention, p.tf32, [&](int head, int branch, int i) {
                const void* weight = branch == 0 ? p.top_weight : p.bottom_weight;
                return small_value<T>(weight, (int64_t)head * window * window + at[i], p.narrow);
            });
        }
        if (thread_index() == 0) {
            shared.tiles[(index + 1) % 2] = FocalTile::at(block, index + 1);
        }
        copy_wait<0>();
        sync_block();
        if (busy) {
            WarpSums<16, C> sums;
            sums.clear();
#pragma unroll 1
            for (int k = 0; k < C; k += depth<T>()) {
                multiply<T, depth<T>()>(sums, own + k, S::kStride, shared.pixels + k, S::kStride, p.tf32);
            }
            sync_warp();
            // By way of shared memory, for whole rows in memory.
            sums.for_pairs(
                [&](int i, int j, const float* pair) { store_pair(own + i * S::kStride + j, pair[0], pair[1]); });
        }
        sync_block();
        if (index + 1 < shared.last) {
            copy_pixels<T, C>(shared.pixels, S::kStride, p, block.image, shared.tiles[(index + 1) % 2]);
            copy_commit();
        }
        if (busy) {
            const int64_t origin = (((int64_t)block.image * p.height + tile.y) * p.width + tile.x) * C;
#pragma unroll S::kTogether
            for (int i = lane_index(); i < 16 * vectors; i += kWarp) {
                const int row = i / vectors, token = own_first + row;
                if (token < tokens) {
                    const int y = columns.quotient(token), x = token - y * columns.n;
                    const int channel = i % vectors * Vector<T>::kValues;
                    const int64_t at = origin + (int64_t)y * p.width * C + x * C + channel;
                    float residual[Vector<T>::kValues], added[Vector<T>::kValues];
                    Vector<T>::load(static_cast<const T*>(p.x) + at).unpack(residual);
                    Vector<T>::load(own + row * S::kStride + channel).unpack(added);
#pragma unroll
                    for (int v = 0; v < Vector<T>::kValues; ++v) {
                        residual[v] += added[v];
                    }
                    Vector<T>::of(residual).store_global(static_cast<T*>(p.out) + at);
                }
            }
        }
    }
}

}  // namespace ipt_fast::cuda
