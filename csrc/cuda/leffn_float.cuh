// The feed-forward network of float.
//
// A block makes a tile of 16 x 8 pixels, in chunks of 16 hidden channels:
//   1. expansion and GELU of the tile with its halo of 2 pixels, 240 pixels, to the hidden map [channel][pixel];
//   2. the depthwise convolution, 4 x 2 pixels a thread, to [channel][pixel] again;
//   3. the projection, which adds to sums in registers, 16 pixels x C a warp.
// Steps 3 of a chunk and 1 of the next one share a span between barriers, and half of the warps begin with either.
//
// Shared memory: the input, normalised (zeros outside of the image, which GELU and a product without bias leave zeros,
// whatever the norm's bias is), the hidden and the convolved chunk, two buffers of weights for the products: for 32,
// 48, 64 and 96 channels 70, 91, 111 and 151 thousand bytes. Two blocks a multiprocessor up to 48 channels (on compute
// capability 8.0 with 32 alone).
#pragma once

#include <cstddef>

#include "leffn_parts.cuh"

namespace ipt_fast::cuda {

template <int C>
struct LeffnFloatTile {
    static constexpr int kThreads = 256, kWarps = kThreads / kWarp;
    static constexpr int kBlocks = C <= 48 ? 2 : 1;  // a multiprocessor
    static constexpr int kWide = 16, kHigh = 8, kPixels = kWide * kHigh;
    static constexpr int kInWide = kWide + 4, kInHigh = kHigh + 4, kInPixels = kInWide * kInHigh;
    static constexpr int kChunk = 16, kRows = kPixels / kWarps;
    static_assert(kRows == 16 && kInPixels % 16 == 0 && kChunk * kPixels == kThreads * 8);
    // Values from one row to the next; those of pixels so that stores of sums and loads for products meet no bank
    // twice.
    static constexpr int kInput = padded_row<float>(C), kMap = kInPixels + 4, kConvolved = kPixels + 8;
    static constexpr int kExpand = padded_row<float>(C), kProject = padded_row<float>(kChunk), kStaged = C + 8;
    static constexpr int kTaps = kChunk * 25;

    alignas(16) float input[kInPixels * kInput];
    alignas(16) float map[kChunk * kMap];
    alignas(16) float convolved[kChunk * kConvolved];
    alignas(16) float expand[2][kChunk * kExpand];
    alignas(16) float project[2][C * kProject];
    alignas(16) float taps[kTaps];
    alignas(16) float norm_weight[C];
    alignas(16) float norm_bias[C];
};

// f(row, column, channel) for all vectors of a region of pixels, this thread's of every row in turn.
template <int Threads, int Rows, int Columns, int Vectors, class F>
IPT_FAST_DEVICE void for_vectors(F f) {
    constexpr int across = Columns * Vectors, together = across < Threads ? Threads / across : 1;
    for (int n = thread_index(); n < together * across; n += Threads) {
        const int column = n % across / Vectors, vector = n % Vectors;
#pragma unroll 2
        for (int row = n / across; row < Rows; row += together) {
            f(row, column, vector);
        }
    }
}

// Asynchronous, to be committed.
template <int C>
IPT_FAST_DEVICE void leffn_load_input(LeffnFloatTile<C>& tile, const float* x, const LeffnPlace& place) {
    using Tile = LeffnFloatTile<C>;
    for_vectors<Tile::kThreads, Tile::kInHigh, Tile::kInWide, C / 4>([&](int row, int column, int vector) {
        const bool there = place.inside(row - 2, column - 2);
        copy_async(tile.input + (row * Tile::kInWide + column) * Tile::kInput + vector * 4,
                   there ? x + place.pixel(row - 2, column - 2) * C + vector * 4 : nullptr, there);
    });
}

template <int C>
IPT_FAST_DEVICE void leffn_load_norm(LeffnFloatTile<C>& tile, const LeffnArguments& p) {
    if (p.norm_weight != nullptr && thread_index() < C) {
        const int i = thread_index();
        tile.norm_weight[i] = small_value<float>(p.norm_weight, i, p.narrow);
        tile.norm_bias[i] = p.norm_bias != nullptr ? small_value<float>(p.norm_bias, i, p.narrow) : 0.0f;
    }
}

// The norm of the tile's input, two threads a pixel. Outside of the image zeros stay.
template <int C>
IPT_FAST_DEVICE void leffn_normalise(LeffnFloatTile<C>& tile, const LeffnArguments& p, const LeffnPlace& place) {
    using Tile = LeffnFloatTile<C>;
    constexpr int vectors = C / 8;
    const int half = thread_index() % 2;
#pragma unroll 1
    for (int pixel = thread_index() / 2; pixel < Tile::kInPixels; pixel += Tile::kThreads / 2) {
        float* row = tile.input + pixel * Tile::kInput;
        float x[vectors][4];
        float sum = 0, squares = 0;
#pragma unroll
        for (int i = 0; i < vectors; ++i) {
            Vector<float>::load(row + (2 * i + half) * 4).unpack(x[i]);
#pragma unroll
            for (int v = 0; v < 4; ++v) {
                sum += x[i][v];
            }
        }
        const float mean = (sum + shuffle_xor(sum, 1)) * (1.0f / C);
#pragma unroll
        for (int i = 0; i < vectors * 4; ++i) {
            const float centred = x[i / 4][i % 4] - mean;
            squares = fmaf(centred, centred, squares);
        }
        const float scale = 1.0f / sqrtf((squares + shuffle_xor(squares, 1)) * (1.0f / C) + p.eps);
        const float shift = p.centered ? mean : 0.0f;
        if (place.inside(pixel / Tile::kInWide - 2, pixel % Tile::kInWide - 2)) {
#pragma unroll
            for (int i = 0; i < vectors; ++i) {
                const int channel = (2 * i + half) * 4;
                float weight[4], bias[4];
                Vector<float>::load(tile.norm_weight + channel).unpack(weight);
                Vector<float>::load(tile.norm_bias + channel).unpack(bias);
#pragma unroll
                for (int v = 0; v < 4; ++v) {
                    x[i][v] = fmaf((x[i][v] - shift) * scale, weight[v], bias[v]);
                }
                Vector<float>::of(x[i]).store(row + channel);
            }
        }
    }
}

// A chunk's taps on their way from memory.
template <int C>
struct LeffnTaps {
    using Tile = LeffnFloatTile<C>;
    static constexpr int kCount = (Tile::kTaps + Tile::kThreads - 1) / Tile::kThreads;
    float values[kCount];

    static IPT_FAST_DEVICE int index(int i) { return thread_index() + i * Tile::kThreads; }
    IPT_FAST_DEVICE void load(const float* from) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            values[i] = index(i) < Tile::kTaps ? from[index(i)] : 0.0f;
        }
    }
    IPT_FAST_DEVICE void store(float* taps) const {
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            if (index(i) < Tile::kTaps) {
                taps[index(i)] = values[i];
            }
        }
    }
};

// Step 1.
template <int C>
IPT_FAST_DEVICE void leffn_expand(LeffnFloatTile<C>& tile, const float* weights, bool tf32) {
    using Tile = LeffnFloatTile<C>;
    BlockA a[C / 8];
#pragma unroll
    for (int k = 0; k < C; k += 8) {
        a[k / 8] = load_a(weights + k, Tile::kExpand);
    }
#pragma unroll 1
    for (int block = warp_index(); block < Tile::kInPixels / 16; block += Tile::kWarps) {
        WarpSums<16, 16> sums;
        sums.clear();
#pragma unroll
        for (int k = 0; k < C; k += 8) {
            const BlockB b = load_b(tile.input + block * 16 * Tile::kInput + k, Tile::kInput);
            multiply_add<float>(sums.values[0][0], a[k / 8], b, tf32);
        }
        sums.for_pairs([&](int channel, int pixel, const float* pair) {
            store_pair(tile.map + channel * Tile::kMap + block * 16 + pixel, leffn_gelu<float>(pair[0]),
                       leffn_gelu<float>(pair[1]));
        });
    }
}

// Step 2.
template <int C>
IPT_FAST_DEVICE void leffn_convolve(LeffnFloatTile<C>& tile) {
    using Tile = LeffnFloatTile<C>;
    const int channel = thread_index() / 16, column = thread_index() % 4 * 4, row = thread_index() % 16 / 4 * 2;
    float taps[25], sums[2][4] = {};
#pragma unroll
    for (int i = 0; i < 25; ++i) {
        taps[i] = tile.taps[channel * 25 + i];
    }
#pragma unroll
    for (int i = 0; i < 6; ++i) {
        const float* from = tile.map + channel * Tile::kMap + (row + i) * Tile::kInWide + column;
        float x[2][4];
        Vector<float>::load(from).unpack(x[0]);
        Vector<float>::load(from + 4).unpack(x[1]);
#pragma unroll
        for (int y = 0; y < 2; ++y) {
            if (i >= y && i - y < 5) {
#pragma unroll
                for (int n = 0; n < 20; ++n) {
                    sums[y][n / 5] =
                        fmaf(taps[(i - y) * 5 + n % 5], x[(n / 5 + n % 5) / 4][(n / 5 + n % 5) % 4], sums[y][n / 5]);
                }
            }
        }
    }
#pragma unroll
    for (int y = 0; y < 2; ++y) {
        Vector<float>::of(sums[y]).store(tile.convolved + channel * Tile::kConvolved + (row + y) * 16 + column);
    }
}

// Step 3, of this warp's rows.
template <int C>
IPT_FAST_DEVICE void leffn_project(WarpSums<16, C>& sums, const LeffnFloatTile<C>& tile, const float* weights,
                                   bool tf32) {
    using Tile = LeffnFloatTile<C>;
#pragma unroll
    for (int k = 0; k < Tile::kChunk; k += 8) {
        const float* from = tile.convolved + k * Tile::kConvolved + warp_index() * Tile::kRows;
        const BlockA rows = load_a_transposed(from, Tile::kConvolved);
#pragma unroll
        for (int j = 0; j < C / 16; ++j) {
            const BlockB b = load_b(weights + j * 16 * Tile::kProject + k, Tile::kProject);
            multiply_add<float>(sums.values[0][j], rows, b, tf32);
        }
    }
}

template <int C>
IPT_FAST_DEVICE void leffn_float(const LeffnArguments& p) {
    using Tile = LeffnFloatTile<C>;
    auto& tile = *shared_memory<Tile>();
    const LeffnPlace place = leffn_place<Tile>(p);
    const float *x = static_cast<const float*>(p.x), *depthwise = static_cast<const float*>(p.depthwise);
    const float *expand = static_cast<const float*>(p.expand), *project = static_cast<const float*>(p.project);
    const int chunks = p.hidden / Tile::kChunk;

    // Buffer n % 2 gets chunk n of the projection and n + 1 of the expansion.
    auto copy_weights = [&](int chunk) {
        if (chunk >= 0 && chunk < chunks) {
            copy_rows(tile.project[chunk & 1], Tile::kProject, C, Tile::kChunk,
                      [&](int row) { return project + chunk * Tile::kChunk + row * p.hidden; });
        }
        if (chunk + 1 < chunks) {
            copy_rows(tile.expand[chunk & 1], Tile::kExpand, Tile::kChunk, C,
                      [&](int row) { return expand + (int64_t)(chunk + 1) * (Tile::kChunk * C) + row * C; });
        }
    };
    leffn_load_input<C>(tile, x, place);
    copy_weights(-1);
    copy_commit();
    copy_weights(0);
    copy_commit();
    leffn_load_norm<C>(tile, p);
    LeffnTaps<C> taps;
    taps.load(depthwise);
    taps.store(tile.taps);
    copy_wait<1>();
    sync_block();
    if (p.norm_weight != nullptr) {
        leffn_normalise<C>(tile, p, place);
        sync_block();
    }
    leffn_expand<C>(tile, tile.expand[1], p.tf32);

    WarpSums<Tile::kRows, C> sums;
    sums.clear();
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
        sync_block();
        copy_weights(chunk + 1);
        copy_commit();
        leffn_convolve<C>(tile);
        copy_wait<1>();
        sync_block();
        const bool more = chunk + 1 < chunks;
        if (more) {
            taps.load(depthwise + (int64_t)(chunk + 1) * Tile::kTaps);
        }
        // Of the two warps of a scheduler one begins with either, so that they keep different units busy.
#pragma unroll 1
        for (int step = 0; step < 2; ++step) {
            if (step == warp_index() / 4 % 2) {
                leffn_project<C>(sums, tile, tile.project[chunk & 1], p.tf32);
            } else if (more) {
                leffn_expand<C>(tile, tile.expand[chunk & 1], p.tf32);
            }
        }
        if (more) {
            taps.store(tile.taps);
        }
    }
    copy_wait<0>();

    // The sums go out through shared memory that no warp reads any longer.
    static_assert(Tile::kPixels * Tile::kStaged * sizeof(float) <= offsetof(Tile, convolved));
    float* staged = reinterpret_cast<float*>(&tile);
    sums.for_pairs([&](int row, int channel, const float* pair) {
        store_pair(staged + (warp_index() * Tile::kRows + row) * Tile::kStaged + channel, pair[0], pair[1]);
    });
    sync_block();
    for_vectors<Tile::kThreads, Tile::kHigh, Tile::kWide, C / 4>([&](int row, int column, int vector) {
        if (place.inside(row, column)) {
            const int64_t at = place.pixel(row, column) * C + vector * 4;
            const float* from = staged + (row * Tile::kWide + column) * Tile::kStaged + vector * 4;
            float y[4] = {};
            if (p.residual) {
                Vector<float>::load(x + at).unpack(y);
            }
#pragma unroll
            for (int v = 0; v < 4; ++v) {
                y[v] += from[v];
            }
            Vector<float>::of(y).store_global(static_cast<float*>(p.y) + at);
        }
    });
}

}  // namespace ipt_fast::cuda
