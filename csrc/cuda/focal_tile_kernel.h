// What both passes of the focal attention layer share: tiles of the map in shared memory, normalised, projected and
// convolved, pixel by pixel in rows of channels. A tile has a border of one pixel, which is zero outside of the image.
#pragma once

#include "focal_attention_layer.h"
#include "tiles.h"

namespace ipt_fast {

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

    IPT_FAST_DEVICE static FocalBlock at(const FocalLayerParams& p, int index, int most_rows) {
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
    IPT_FAST_DEVICE int64_t matrix(const FocalLayerParams& p, int branch) const {
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
IPT_FAST_DEVICE void load_small(const FocalLayerParams& p, FocalNorm<C>& norm, T* taps, Channel channel) {
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
    IPT_FAST_DEVICE void for_pixels(const FocalLayerParams& p, F f) const {
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
IPT_FAST_DEVICE void copy_pixels(T* to, int stride, const FocalLayerParams& p, int image, const FocalTile& tile) {
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
IPT_FAST_DEVICE void normalise_pixels(T* pixels, int stride, const FocalLayerParams& p, const FocalTile& tile,
                                      const FocalNorm<C>& norm) {
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
            Sums<Rows, chunk> sums;
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

// ---- depthwise convolution, 3 x 3 ----------------------------------------------------------------------------------

constexpr int kConvolvedChannels = 8, kConvolvedRows = 4;  // of convolve_rows

// Two channels of float, two columns wide and `rows` down, begun at the pixel above and left of the first:
// emit(row, sums of [column][channel]).
template <class Emit>
IPT_FAST_DEVICE void convolve_strip(const float* from, int stride, int across, int rows, const float* taps,
                                    int tap_stride, Emit emit) {
    float tap[9][2];
#pragma unroll
    for (int i = 0; i < 9; ++i) {
        load_pair(taps + i * tap_stride, tap[i][0], tap[i][1]);
    }
    // Every row of pixels is the lowest of one row of sums, the middle of the next, and the highest of that after it.
    float low[2][2] = {}, middle[2][2] = {};
#pragma unroll 1
    for (int row = 0; row < rows + 2; ++row) {
        float in[4][2];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            load_pair(from + (row * across + i) * stride, in[i][0], in[i][1]);
        }
        float sums[2][2];
#pragma unroll
        for (int v = 0; v < 4; ++v) {
            const int i = v / 2, c = v % 2;
            float done = low[i][c], next = middle[i][c], begun = 0;
#pragma unroll
            for (int x = 0; x < 3; ++x) {
                done += in[i + x][c] * tap[6 + x][c];
                next += in[i + x][c] * tap[3 + x][c];
                begun += in[i + x][c] * tap[x][c];
            }
            sums[i][c] = done;
            low[i][c] = next;
            middle[i][c] = begun;
        }
        sync_warp();
        if (row >= 2) {
            emit(row - 2, sums);
        }
    }
}

// Eight channels of up to four rows of `columns` pixels by a warp, begun at the pixel above and left of the first:
// emit(row, column, channel, sum, sum of the next channel), which may write to that row and column of `from`, as no
// lane reads the row any more. Values of 16 bits by tensor cores: a row of pixels, moved by a tap, times the tap's
// weights on the diagonal of a matrix, two taps at a time.
template <class T, class Emit>
IPT_FAST_DEVICE void convolve_rows(const T* from, int stride, int across, int columns, int rows, const T* taps,
                                   int tap_stride, Emit emit) {
    const int lane = lane_index();
    if constexpr (sizeof(T) == 4) {
        const int channel = lane % 4 * 2, x = lane / 4 * 2;
        convolve_strip(from + (x < columns ? x : 0) * stride + channel, stride, across, rows, taps + channel,
                       tap_stride, [&](int y, const float (&sums)[2][2]) {
                           if (x < columns) {
                               emit(y, x, channel, sums[0][0], sums[0][1]);
                           }
                           if (x + 1 < columns) {
                               emit(y, x + 1, channel, sums[1][0], sums[1][1]);
                           }
                       });
    } else {
        uint32_t diagonal[9];
#pragma unroll
        for (int i = 0; i < 9; ++i) {
            const uint32_t bits = taps[i * tap_stride + lane / 4].bits;
            const int place = lane / 4 - lane % 4 * 2;
            diagonal[i] = place == 0 ? bits : place == 1 ? bits << 16 : 0;
        }
        // Columns beyond the last repeat it, and rows too: their sums go nowhere.
        const T* own = from + (lane % 16 < columns ? lane % 16 : columns - 1) * stride;
        const int side = lane / 16, line = across * stride;
        const auto row_at = [&](int row) { return own + (row < rows + 1 ? row : rows + 1) * line; };
        // As loaded they are operands: of each row its left and middle taps, of two rows their right taps.
        uint32_t left[kConvolvedRows + 2][4], right[kConvolvedRows / 2 + 1][4];
#pragma unroll
        for (int y = -1; y < kConvolvedRows; ++y) {
#pragma unroll
            for (int row = y < 0 ? 0 : y + 2; row < y + 3; ++row) {
                load_matrices(left[row], row_at(row) + side * stride);
                if (row % 2 == 0) {
                    load_matrices(right[row / 2], row_at(row + side) + 2 * stride);
                }
            }
            if (y >= 0 && y < rows) {
                // The right tap that remains of three: twice, as zeros times any other could be no zeros.
                const bool even = y % 2 == 0;
                const uint32_t* its = right[(even ? y + 2 : y) / 2] + (even ? 0 : 2);
                const uint32_t last[4] = {its[0], its[1], its[0], its[1]};
                float sums[4] = {};
                multiply_add(sums, left[y], diagonal[0], diagonal[1], T{});
                multiply_add(sums, left[y + 1], diagonal[3], diagonal[4], T{});
                multiply_add(sums, left[y + 2], diagonal[6], diagonal[7], T{});
                multiply_add(sums, right[(y + 1) / 2], diagonal[even ? 2 : 5], diagonal[even ? 5 : 8], T{});
                multiply_add(sums, last, diagonal[even ? 8 : 2], 0, T{});
                sync_warp();
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    if (lane / 4 + i * 8 < columns) {
                        emit(y, lane / 4 + i * 8, lane % 4 * 2, sums[2 * i], sums[2 * i + 1]);
                    }
                }
            }
        }
    }
}

}  // namespace ipt_fast
