// A block takes tiles of 16 x 16 pixels of 64 channels (of float 32) with their halo into shared memory, 128 bytes a
// pixel: 51 thousand bytes for 5 x 5, for the gradient of the weight 33 thousand more. A warp has 4 x 8 of the pixels
// and a lane two channels (one); it walks down the rows and holds one row of input, the taps and K rows of sums in
// registers, for the gradient K rows of the output's gradient and the taps' sums.
//
// Convolution, a value: 1.56 reads (the halo's from the cache), one write, 2 K^2 FLOPs; of two values at K = 5 three
// loads from shared memory for 50 multiply-adds.
// Gradient: 2.56 reads; a block sums one share of all tiles, its warps add in order, and a second kernel adds the
// shares, in order too.
#pragma once

#include "depthwise.h"
#include "tiles.h"

namespace ipt_fast {

template <class T, int K>
struct DepthwiseTile {
    static constexpr int kPer = 4 / sizeof(T), kChannels = kPer * kWarp, kValues = 16 / sizeof(T);
    static constexpr int kSide = kDepthwiseTile, kInSide = kSide + K - 1;
    static constexpr int kColumns = 4, kRows = 8;  // of a warp
    static constexpr int kWarps = kDepthwiseThreads / kWarp;

    alignas(16) T input[kInSide * kInSide * kChannels];
    alignas(16) T weight[kChannels * K * K];
};

template <class T, int K>
struct DepthwiseGradientTile {
    using Tile = DepthwiseTile<T, K>;
    alignas(16) T input[Tile::kInSide * Tile::kInSide * Tile::kChannels];  // and at the end the warps' sums
    alignas(16) T grad[Tile::kSide * Tile::kSide * Tile::kChannels];
};

// A tile's first pixel and a block's first channel.
struct DepthwisePlace {
    int64_t image;
    int y, x, channel;
};

IPT_FAST_DEVICE DepthwisePlace depthwise_place(const DepthwiseShape& s, int64_t tile, int channel) {
    const int across = (s.width + kDepthwiseTile - 1) / kDepthwiseTile;
    const int down = (s.height + kDepthwiseTile - 1) / kDepthwiseTile;
    const int64_t row = tile / across;
    return {row / down * s.height * s.width, (int)(row % down) * kDepthwiseTile, (int)(tile % across) * kDepthwiseTile,
            channel};
}

// to[pixel][channel] of Side x Side pixels, the first of them `before` rows and columns before the tile; zeros outside.
template <class T, int Side>
IPT_FAST_DEVICE void depthwise_load(T* to, const T* from, const DepthwiseShape& s, const DepthwisePlace& place,
                                    int before) {
    constexpr int values = 16 / sizeof(T), vectors = 8;
    const int vector = thread_index() % vectors * values, channel = place.channel + vector;
    for (int pixel = thread_index() / vectors; pixel < Side * Side; pixel += kDepthwiseThreads / vectors) {
        const int y = place.y + pixel / Side - before, x = place.x + pixel % Side - before;
        const bool there = y >= 0 && y < s.height && x >= 0 && x < s.width && channel < s.channels;
        const int64_t at = place.image + (int64_t)y * s.width + x;
        copy_async(to + pixel * vectors * values + vector, there ? from + at * s.channels + channel : nullptr, there);
    }
}

// This lane's channels of a pixel.
template <class T>
IPT_FAST_DEVICE void depthwise_values(const T* from, float (&values)[4 / sizeof(T)]) {
    if constexpr (sizeof(T) == 2) {
        load_pair(from, values[0], values[1]);
    } else {
        values[0] = from[0];
    }
}

template <class T, int K>
IPT_FAST_KERNEL IPT_FAST_BOUNDS(kDepthwiseThreads, 2) depthwise_kernel(IPT_FAST_PARAMS(DepthwiseParams) p) {
    using Tile = DepthwiseTile<T, K>;
    auto& tile = *shared_memory<Tile>();
    constexpr int per = Tile::kPer, columns = Tile::kColumns, rows = Tile::kRows;
    const int parts = depthwise_parts<T>(p.shape);
    const DepthwisePlace place =
        depthwise_place(p.shape, block_index() / parts, (int)(block_index() % parts) * Tile::kChannels);
    depthwise_load<T, Tile::kInSide>(tile.input, static_cast<const T*>(p.x), p.shape, place, K / 2);
    const T* weight = static_cast<const T*>(p.weight) + (int64_t)place.channel * K * K;
    const int weights = (p.shape.channels - place.channel) * K * K;
    for (int i = thread_index() * Tile::kValues; i < Tile::kChannels * K * K; i += kDepthwiseThreads * Tile::kValues) {
        copy_async(tile.weight + i, i < weights ? weight + i : nullptr, i < weights);
    }
    copy_commit();
    copy_wait<0>();
    sync_block();

    const int lane = lane_index(), column = warp_index() % 4 * columns, row = warp_index() / 4 * rows;
    float taps[K * K][per];
#pragma unroll
    for (int i = 0; i < K * K; ++i) {
#pragma unroll
        for (int v = 0; v < per; ++v) {
            taps[i][v] = to_float(tile.weight[(lane * per + v) * K * K + (p.flip ? K * K - 1 - i : i)]);
        }
    }
    const T* from = tile.input + (row * Tile::kInSide + column) * Tile::kChannels + lane * per;
    const int channel = place.channel + lane * per;
    const int64_t first = place.image + (int64_t)(place.y + row) * p.shape.width + place.x + column;
    T* to = static_cast<T*>(p.y) + first * p.shape.channels + channel;
    const int inside = channel < p.shape.channels ? p.shape.width - place.x - column : 0;
    float sums[rows][columns][per] = {};
#pragma unroll
    for (int i = 0; i < rows + K - 1; ++i) {
        float x[columns + K - 1][per];
#pragma unroll
        for (int j = 0; j < columns + K - 1; ++j) {
            depthwise_values(from + (i * Tile::kInSide + j) * Tile::kChannels, x[j]);
        }
#pragma unroll
        for (int k = 0; k < K; ++k) {
            if (i >= k && i - k < rows) {
#pragma unroll
                for (int n = 0; n < columns * K * per; ++n) {
                    const int v = n % per, j = n / per % columns, l = n / per / columns;
                    sums[i - k][j][v] = fmaf(taps[k * K + l][v], x[j + l][v], sums[i - k][j][v]);
                }
            }
        }
        const int done = i - K + 1;
        if (done >= 0 && place.y + row + done < p.shape.height) {
#pragma unroll
            for (int j = 0; j < columns; ++j) {
                if (j < inside) {
                    T* pixel = to + ((int64_t)done * p.shape.width + j) * p.shape.channels;
                    if constexpr (per == 2) {
                        store_pair(pixel, sums[done][j][0], sums[done][j][1]);
                    } else {
                        *pixel = from_float<T>(sums[done][j][0]);
                    }
                }
            }
        }
    }
}

template <class T, int K>
IPT_FAST_KERNEL IPT_FAST_BOUNDS(kDepthwiseThreads, 2)
    depthwise_gradient_kernel(IPT_FAST_PARAMS(DepthwiseGradientParams) p) {
    using Tile = DepthwiseTile<T, K>;
    auto& tile = *shared_memory<DepthwiseGradientTile<T, K>>();
    constexpr int per = Tile::kPer, columns = Tile::kColumns, rows = Tile::kRows;
    const int parts = depthwise_parts<T>(p.shape), first_channel = (int)(block_index() % parts) * Tile::kChannels;
    const int64_t share = block_index() / parts, tiles = depthwise_tiles(p.shape);
    const int lane = lane_index(), column = warp_index() % 4 * columns, row = warp_index() / 4 * rows;
    const T* from = tile.input + (row * Tile::kInSide + column) * Tile::kChannels + lane * per;
    const T* from_grad = tile.grad + (row * Tile::kSide + column) * Tile::kChannels + lane * per;
    float sums[K * K][per] = {};
#pragma unroll 1
    for (int64_t i_tile = tiles * share / p.shares; i_tile < tiles * (share + 1) / p.shares; ++i_tile) {
        const DepthwisePlace place = depthwise_place(p.shape, i_tile, first_channel);
        sync_block();
        depthwise_load<T, Tile::kInSide>(tile.input, static_cast<const T*>(p.x), p.shape, place, K / 2);
        depthwise_load<T, Tile::kSide>(tile.grad, static_cast<const T*>(p.grad), p.shape, place, 0);
        copy_commit();
        copy_wait<0>();
        sync_block();
        float grad[rows][columns][per];
#pragma unroll
        for (int i = 0; i < rows + K - 1; ++i) {
            float x[columns + K - 1][per];
#pragma unroll
            for (int j = 0; j < columns + K - 1; ++j) {
                depthwise_values(from + (i * Tile::kInSide + j) * Tile::kChannels, x[j]);
            }
            if (i < rows) {
#pragma unroll
                for (int j = 0; j < columns; ++j) {
                    depthwise_values(from_grad + (i * Tile::kSide + j) * Tile::kChannels, grad[i % rows][j]);
                }
            }
#pragma unroll
            for (int k = 0; k < K; ++k) {
                if (i >= k && i - k < rows) {
#pragma unroll
                    for (int n = 0; n < columns * K * per; ++n) {
                        const int v = n % per, l = n / per % K, j = n / per / K;
                        sums[k * K + l][v] = fmaf(grad[i - k][j][v], x[j + l][v], sums[k * K + l][v]);
                    }
                }
            }
        }
    }
    float* all = reinterpret_cast<float*>(tile.input);
    static_assert(sizeof(tile.input) >= Tile::kWarps * K * K * Tile::kChannels * sizeof(float));
    sync_block();
#pragma unroll
    for (int i = 0; i < K * K; ++i) {
#pragma unroll
        for (int v = 0; v < per; ++v) {
            all[(warp_index() * K * K + i) * Tile::kChannels + lane * per + v] = sums[i][v];
        }
    }
    sync_block();
    for (int i = thread_index(); i < K * K * Tile::kChannels; i += kDepthwiseThreads) {
        const int tap = i / Tile::kChannels, channel = first_channel + i % Tile::kChannels;
        float sum = 0;
#pragma unroll
        for (int warp = 0; warp < Tile::kWarps; ++warp) {
            sum += all[warp * K * K * Tile::kChannels + i];
        }
        if (channel < p.shape.channels) {
            p.sums[(share * K * K + tap) * p.shape.channels + channel] = sum;
        }
    }
}

// A block adds 32 sums of neighbouring channels, a warp every eighth share of them.
template <int Threads>
IPT_FAST_KERNEL IPT_FAST_BOUNDS(Threads, 4) depthwise_sum_kernel(IPT_FAST_PARAMS(DepthwiseSumParams) p) {
    constexpr int warps = Threads / kWarp;
    float* shared = shared_memory<float>();
    const int count = p.taps * p.channels, i = (int)block_index() * kWarp + lane_index();
    float sum = 0;
    if (i < count) {
#pragma unroll 4
        for (int share = warp_index(); share < p.shares; share += warps) {
            sum += p.sums[(int64_t)share * count + i];
        }
    }
    shared[warp_index() * kWarp + lane_index()] = sum;
    sync_block();
    if (warp_index() == 0 && i < count) {
        sum = 0;
#pragma unroll
        for (int warp = 0; warp < warps; ++warp) {
            sum += shared[warp * kWarp + lane_index()];
        }
        p.gradient[i % p.channels * p.taps + i / p.channels] = sum;
    }
}

}  // namespace ipt_fast
