// What both passes of the focal attention layer share: tiles of the map in shared memory, normalised and projected,
// pixel by pixel in rows of channels. A tile has a border of one pixel, which is zero outside of the image.
#pragma once

#include "focal_attention_layer.cuh"
#include "warp_tiles.cuh"

namespace ipt_fast::cuda {

constexpr int kFocalColumns = 16;  // most columns of a tile

// Most rows of a tile; values of float take twice the memory.
template <class T>
IPT_FAST_BOTH constexpr int focal_rows() {
    return sizeof(T) == 2 ? 8 : 4;
}
template <class T>
IPT_FAST_BOTH constexpr int focal_tokens() {
    return focal_rows<T>() * kFocalColumns;
}
// Pixels of a tile with its border, up to a multiple of `unit`.
template <class T>
IPT_FAST_BOTH constexpr int focal_pixels(int unit) {
    return ((focal_rows<T>() + 2) * (kFocalColumns + 2) + unit - 1) / unit * unit;
}

// i / n for small n and i: i n < 2^16.
struct Divisor {
    int n, inverse;

    IPT_FAST_DEVICE explicit Divisor(int n) : n(n), inverse(65536 / n + 1) {}
    IPT_FAST_DEVICE int quotient(int i) const { return (int)((uint32_t)(i * inverse) >> 16); }
};

// A block of the map and its tiles, which have about the same size. Blocks are counted across, then down, then by
// images; their sides and the counts of their tiles have products below 2^31.
struct FocalBlock {
    int image, down, across;  // which
    int y, x, rows, columns;
    int tiles_across, tiles;
    int tile_rows, tile_columns;  // but for the last

    IPT_FAST_DEVICE static FocalBlock at(const FocalAttentionLayerArguments& p, int index, int most_rows) {
        FocalBlock b;
        b.across = index % p.horizontal.blocks;
        index /= p.horizontal.blocks;
        b.down = index % p.vertical.blocks;
        b.image = index / p.vertical.blocks;
        b.y = p.vertical.begin(b.down);
        b.x = p.horizontal.begin(b.across);
        b.rows = p.vertical.end(b.down) - b.y;
        b.columns = p.horizontal.end(b.across) - b.x;
        const int tiles_down = (b.rows + most_rows - 1) / most_rows;
        b.tiles_across = (b.columns + kFocalColumns - 1) / kFocalColumns;
        b.tiles = tiles_down * b.tiles_across;
        b.tile_rows = (b.rows + tiles_down - 1) / tiles_down;
        b.tile_columns = (b.columns + b.tiles_across - 1) / b.tiles_across;
        return b;
    }

    // The first attention matrix of its window.
    IPT_FAST_DEVICE int64_t matrix(const FocalAttentionLayerArguments& p, int branch) const {
        const int64_t window = (int64_t)image * p.vertical.windows + p.vertical.window_of(branch, down);
        return (window * p.horizontal.windows + p.horizontal.window_of(branch, across)) * p.heads * 2;
    }
    // The first tile of a share of them.
    IPT_FAST_DEVICE int first(int share, int shares) const { return tiles * share / shares; }
};

struct FocalTile {
    int top, left;  // in the block
    int y, x, rows, columns;

    IPT_FAST_DEVICE static FocalTile at(const FocalBlock& block, int index) {
        FocalTile t;
        t.top = index / block.tiles_across * block.tile_rows;
        t.left = index % block.tiles_across * block.tile_columns;
        t.rows = block.rows - t.top < block.tile_rows ? block.rows - t.top : block.tile_rows;
        t.columns = block.columns - t.left < block.tile_columns ? block.columns - t.left : block.tile_columns;
        t.y = block.y + t.top;
        t.x = block.x + t.left;
        return t;
    }

    IPT_FAST_DEVICE int tokens() const { return rows * columns; }
    IPT_FAST_DEVICE int pixels() const { return (rows + 2) * (columns + 2); }
};

// ---- stages --------------------------------------------------------------------------------------------------------

// 1 / sqrt(x); of values of 16 bits the GPU's approximation, which is good to two units of float.
template <class T>
IPT_FAST_DEVICE float inverse_root(float x) {
#ifdef __CUDACC__
    return sizeof(T) == 2 ? rsqrtf(x) : 1.0f / sqrtf(x);
#else
    return 1.0f / sqrtf(x);
#endif
}

template <int C>
struct FocalNorm {
    alignas(16) float weight[C];
    alignas(16) float bias[C];
};

// norm and depthwise taps, [tap][channel], of channels channel(i), i < Channels, to shared memory. By the whole block
// of Threads, which asks for several values before it stores one.
template <class T, int C, int Channels, int Threads, class Channel>
IPT_FAST_DEVICE void load_small(const FocalAttentionLayerArguments& p, FocalNorm<C>& norm, T* taps, Channel channel) {
    constexpr int each = (9 * Channels + Threads - 1) / Threads;
    static_assert(C <= Threads);
    const T* weight = static_cast<const T*>(p.depthwise_weight);
    T tap[each] = {};
#pragma unroll
    for (int n = 0; n < each; ++n) {
        const int i = n * Threads + thread_index();
        if (i < 9 * Channels) {
            tap[n] = weight[channel(i % Channels) * 9 + i / Channels];
        }
    }
    if (const int i = thread_index(); i < C) {
        norm.weight[i] = small_value<T>(p.norm_weight, i, p.narrow);
        norm.bias[i] = p.norm_bias == nullptr ? 0.0f : small_value<T>(p.norm_bias, i, p.narrow);
    }
#pragma unroll
    for (int n = 0; n < each; ++n) {
        const int i = n * Threads + thread_index();
        if (i < 9 * Channels) {
            taps[i] = tap[n];
        }
    }
}

// How the threads of a block share the pixels of a tile and its border: two or four lanes have a pixel, so that all
// have as many vectors of it.
template <class T, int C>
struct PixelShare {
    static constexpr int kValues = Vector<T>::kValues, kVectors = C / kValues, kLanes = kVectors % 4 == 0 ? 4 : 2;
    static constexpr int kEach = kVectors / kLanes;
    static_assert(kVectors % kLanes == 0);

    int lane, pixels, map_y, map_x;
    Divisor across;

    IPT_FAST_DEVICE explicit PixelShare(const FocalTile& tile)
        : lane((int)((unsigned)thread_index() % kLanes)),
          pixels(tile.pixels()),
          map_y(tile.y - 1),
          map_x(tile.x - 1),
          across(tile.columns + 2) {}

    // f(pixel, its row and column in the map, whether that has it) for the thread's pixels. Of a warp all lanes go on
    // together, maybe to pixels that the tile does not have.
    template <class F>
    IPT_FAST_DEVICE void for_pixels(const FocalAttentionLayerArguments& p, F f) const {
        const int step = block_threads() / kLanes, own = (int)((unsigned)thread_index() / kLanes);
#pragma unroll 1
        for (int first = 0; first < pixels; first += step) {
            const int pixel = first + own, down = across.quotient(pixel);
            const int y = map_y + down, x = map_x + pixel - down * across.n;
            f(pixel, y, x, pixel < pixels && (unsigned)y < (unsigned)p.height && (unsigned)x < (unsigned)p.width);
        }
    }
    IPT_FAST_DEVICE int channel(int vector) const { return (vector * kLanes + lane) * kValues; }
};

// The pixels of a tile and its border, asynchronously; to be committed, waited for and normalised. By the whole block.
template <class T, int C>
IPT_FAST_DEVICE void copy_pixels(T* to, int stride, const FocalAttentionLayerArguments& p, int image,
                                 const FocalTile& tile) {
    const PixelShare<T, C> share(tile);
    const T* x = static_cast<const T*>(p.x) + (int64_t)image * p.height * p.width * C;
    share.for_pixels(p, [&](int pixel, int map_y, int map_x, bool there) {
        if (there) {
            const T* from = x + ((int64_t)map_y * p.width + map_x) * C;
#pragma unroll
            for (int v = 0; v < share.kEach; ++v) {
                copy_async(to + pixel * stride + share.channel(v), from + share.channel(v), true);
            }
        }
    });
}

// What copy_pixels() has brought becomes normalised, and zeros outside of the image. Every thread has its own copies.
// Of a lane's vectors `Held` have their weights in registers.
template <class T, int C, int Held>
IPT_FAST_DEVICE void normalise_pixels(T* pixels, int stride, const FocalAttentionLayerArguments& p,
                                      const FocalTile& tile, const FocalNorm<C>& norm) {
    constexpr int values = Vector<T>::kValues;
    using Share = PixelShare<T, C>;
    const Share share(tile);
    constexpr int held = Held < Share::kEach ? Held : Share::kEach;
    float weight[held][values];
#pragma unroll
    for (int i = 0; i < held * values; ++i) {
        weight[i / values][i % values] = norm.weight[share.channel(i / values) + i % values];
    }
    const bool biased = p.norm_bias != nullptr;
    share.for_pixels(p, [&](int pixel, int, int, bool there) {
        T* own = pixels + pixel * stride;
        float loaded[Share::kEach][values] = {};
        if (there) {
#pragma unroll
            for (int v = 0; v < Share::kEach; ++v) {
                Vector<T>::load(own + share.channel(v)).unpack(loaded[v]);
            }
        }
        float sum = 0;
#pragma unroll
        for (int i = 0; i < C / Share::kLanes; ++i) {
            sum += loaded[i / values][i % values];
        }
        sum += shuffle_xor(sum, 1);
        if constexpr (Share::kLanes == 4) {
            sum += shuffle_xor(sum, 2);
        }
        const float mean = sum * (1.0f / C);
        float squares = 0;
#pragma unroll
        for (int i = 0; i < C / Share::kLanes; ++i) {
            float& centered = loaded[i / values][i % values];
            centered -= mean;
            squares += centered * centered;
        }
        squares += shuffle_xor(squares, 1);
        if constexpr (Share::kLanes == 4) {
            squares += shuffle_xor(squares, 2);
        }
        const float scale = inverse_root<T>(squares * (1.0f / C) + p.eps), offset = p.centered ? 0.0f : mean * scale;
        if (pixel < share.pixels) {
#pragma unroll
            for (int v = 0; v < Share::kEach; ++v) {
                const int channel = share.channel(v);
                Vector<T> vector = {};
                if (there) {
#pragma unroll
                    for (int i = 0; i < values; ++i) {
                        const float w = v < held ? weight[v][i] : norm.weight[channel + i];
                        loaded[v][i] = (loaded[v][i] * scale + offset) * w;
                    }
                    if (biased) {
#pragma unroll
                        for (int i = 0; i < values; ++i) {
                            loaded[v][i] += norm.bias[channel + i];
                        }
                    }
                    vector = Vector<T>::of(loaded[v]);
                }
                vector.store(own + channel);
            }
        }
    });
}

// Rows of C channels become rows of Columns channels at the same place, `Rows` of them by a warp at once, which has
// read them to the end of its registers before it writes: no other warp reads or writes these. By the whole block.
template <class T, int C, int Columns, int Rows>
IPT_FAST_DEVICE void project_in_place(T* pixels, int stride, int count, const T* weight, int weight_stride, bool tf32) {
    constexpr int chunk = Rows > 16 || Columns % 32 != 0 ? 16 : 32, steps = C / depth<T>();
    static_assert(Columns % chunk == 0);
#pragma unroll 1
    for (int row = warp_index() * Rows; row < count; row += block_threads() / kWarp * Rows) {
        T* own = pixels + row * stride;
        BlockA a[steps][Rows / 16];
#pragma unroll
        for (int k = 0; k < steps; ++k) {
#pragma unroll
            for (int i = 0; i < Rows / 16; ++i) {
                a[k][i] = load_a(own + i * 16 * stride + k * depth<T>(), stride);
            }
        }
        sync_warp();
#pragma unroll 1
        for (int column = 0; column < Columns; column += chunk) {
            WarpSums<Rows, chunk> sums;
            sums.clear();
#pragma unroll
            for (int k = 0; k < steps; ++k) {
#pragma unroll
                for (int j = 0; j < chunk / 16; ++j) {
                    const T* from = weight + (column + j * 16) * weight_stride + k * depth<T>();
                    const BlockB b = load_b(from, weight_stride);
#pragma unroll
                    for (int i = 0; i < Rows / 16; ++i) {
                        multiply_add<T>(sums.values[i][j], a[k][i], b, tf32);
                    }
                }
            }
            sums.for_pairs(
                [&](int i, int j, const float* pair) { store_pair(own + i * stride + column + j, pair[0], pair[1]); });
        }
    }
}

}  // namespace ipt_fast::cuda
