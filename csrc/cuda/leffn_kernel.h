// A block makes a tile of 16 x 16 pixels (of float 16 x 8), in chunks of 32 (16) hidden channels:
//   1. expansion and GELU of the tile with its halo of 2 pixels, 400 (240) pixels, to the hidden map [channel][pixel];
//   2. the depthwise convolution, to [channel][pixel] again;
//   3. the projection, which adds to sums in registers, 32 (16) pixels x C a warp.
// Steps 3 of a chunk and 1 of the next one share a span between barriers, and half of the warps begin with either.
//
// In 16 bits the convolution is a product of matrices, too: of a channel, 4 x 4 pixels of output are its rows, the 8 x
// 8 pixels of input below them the terms, and 8 such patches the columns. 25 of the 64 products count, yet vector
// arithmetic would take four times the instructions. Of float it is vector arithmetic, 4 x 2 pixels a thread.
//
// Shared memory: the input, normalised (zeros outside of the image, which GELU and a product without bias leave zeros,
// whatever the norm's bias is), the hidden and the convolved chunk, two buffers of weights for the products: for 32,
// 48, 64 and 96 channels 96, 114, 131 and 166 thousand bytes in 16 bits, 70, 91, 111 and 151 of float. Two blocks a
// multiprocessor up to 48 channels (on compute capability 8.0 of float with 32 alone).
//
// Memory a pixel: 1.56 C values in (the halo's from the cache), C out, and C more from the cache with a residual.
// Work a pixel for M hidden channels in 16 bits: 2 (1.56 + 1) C M FLOPs of products, 128 M of products for the
// convolution (of which 50 M count), 1.56 M GELUs of 8 instructions. Instructions are the limit, the GELUs most of
// them.
#pragma once

#include <cstddef>
#include <type_traits>

#include "leffn_small_kernel.h"
#include "leffn_tile.h"

namespace ipt_fast {

// The expansion of 16 pixels; `a`: the chunk's weights.
template <class T, int C>
IPT_FAST_DEVICE void leffn_expand_block(Sums<LeffnTile<T, C>::kChunk, 16>& sums, const LeffnTile<T, C>& tile,
                                        const BlockA (&a)[LeffnTile<T, C>::kChunk / 16][C / depth<T>()], int block,
                                        bool tf32) {
    using Tile = LeffnTile<T, C>;
    sums.clear();
#pragma unroll
    for (int k = 0; k < C; k += depth<T>()) {
        const BlockB b = load_b(tile.input + block * 16 * Tile::kInput + k, Tile::kInput);
#pragma unroll
        for (int i = 0; i < Tile::kChunk / 16; ++i) {
            multiply_add<T>(sums.values[i][0], a[i][k / depth<T>()], b, tf32);
        }
    }
}

template <class T, int C>
IPT_FAST_DEVICE void leffn_activate_block(LeffnTile<T, C>& tile, Sums<LeffnTile<T, C>::kChunk, 16>& sums, int block) {
    using Tile = LeffnTile<T, C>;
    sums.for_pairs([&](int channel, int pixel, const float* pair) {
        store_pair(tile.map + channel * Tile::kMap + block * 16 + pixel, leffn_gelu<T>(pair[0]),
                   leffn_gelu<T>(pair[1]));
    });
}

// Step 1.
template <class T, int C>
IPT_FAST_DEVICE void leffn_expand(LeffnTile<T, C>& tile, const T* weights, bool tf32) {
    using Tile = LeffnTile<T, C>;
    constexpr int blocks = Tile::kInPixels / 16, even = Tile::kSmall ? blocks / Tile::kWarps * Tile::kWarps : blocks;
    BlockA a[Tile::kChunk / 16][C / depth<T>()];
#pragma unroll
    for (int i = 0; i < Tile::kChunk / 16; ++i) {
#pragma unroll
        for (int k = 0; k < C; k += depth<T>()) {
            a[i][k / depth<T>()] = load_a(weights + i * 16 * Tile::kExpand + k, Tile::kExpand);
        }
    }
    Sums<Tile::kChunk, 16> sums[2];
    if constexpr (Tile::kSmall && Tile::kBlocks == 1) {
        // Two warps a scheduler: the products of a block are under way while the one before is activated.
        constexpr int rounds = even / Tile::kWarps;
        leffn_expand_block<T, C>(sums[0], tile, a, warp_index(), tf32);
#pragma unroll
        for (int i = 0; i < rounds; ++i) {
            if (i + 1 < rounds) {
                leffn_expand_block<T, C>(sums[(i + 1) % 2], tile, a, warp_index() + (i + 1) * Tile::kWarps, tf32);
            }
            leffn_activate_block<T, C>(tile, sums[i % 2], warp_index() + i * Tile::kWarps);
        }
    } else {
#pragma unroll 1
        for (int block = warp_index(); block < even; block += Tile::kWarps) {
            leffn_expand_block<T, C>(sums[0], tile, a, block, tf32);
            leffn_activate_block<T, C>(tile, sums[0], block);
        }
    }
    if constexpr (even < blocks) {
        // One block is left, 16 channels x 8 pixels of which go to each of four warps.
        static_assert(even + 1 == blocks && Tile::kChunk == 32 && Tile::kSmall);
        if (warp_index() < 4) {
            const int down = warp_index() % 2 * 16, across = warp_index() / 2;
            float sums[4] = {};
#pragma unroll
            for (int k = 0; k < C; k += 16) {
                const BlockA rows = load_a(weights + down * Tile::kExpand + k, Tile::kExpand);
                const BlockB b = load_b(tile.input + even * 16 * Tile::kInput + k, Tile::kInput);
                multiply_add(sums, rows.words, across ? b.words[2] : b.words[0], across ? b.words[3] : b.words[1], T{});
            }
            const int lane = lane_index();
            T* to = tile.map + (down + lane / 4) * Tile::kMap + even * 16 + across * 8 + lane % 4 * 2;
            store_pair(to, leffn_gelu<T>(sums[0]), leffn_gelu<T>(sums[1]));
            store_pair(to + 8 * Tile::kMap, leffn_gelu<T>(sums[2]), leffn_gelu<T>(sums[3]));
        }
    }
}

// Step 2 in 16 bits. Matrices of taps have a row for every pixel of a patch and as columns two rows of its input, which
// are rows of shifted taps; those of a map have a column for every patch. Lane i has patch i / 4, in row i / 16 * 2 (+
// 1, the second product), column i / 4 % 4 of the tile's 4 x 4 patches.
template <class T, int C>
IPT_FAST_DEVICE void leffn_convolve_small(LeffnTile<T, C>& tile) {
    using Tile = LeffnTile<T, C>;
    constexpr int channels = Tile::kChunk / Tile::kWarps;
    const int lane = lane_index(), patch = lane / 4, pair = lane % 4 * 2;
    int rows[4];  // for load_matrices(): of the lane's pixel and input row, where its taps begin
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        const int row = 2 * k + lane / 16 - lane / 4 % 2 - lane / 8 % 2 * 2;
        rows[k] = row >= 0 && row < 5 ? (row * 4 + lane % 4) * 4 : Tile::kTapChannel - 4;
    }
    const uint32_t* taps = tile.taps + warp_index() * channels * Tile::kTapChannel;
    const T* map =
        tile.map + warp_index() * channels * Tile::kMap + patch / 4 * 8 * Tile::kInWide + patch % 4 * 4 + pair;
    T* to = tile.convolved + warp_index() * channels * Tile::kConvolved + patch * 8 + pair;
#pragma unroll
    for (int channel = 0; channel < channels; ++channel) {
        uint32_t input[12];  // rows of the patch, and of the one below it
#pragma unroll
        for (int i = 0; i < 12; ++i) {
            input[i] = *reinterpret_cast<const uint32_t*>(map + i * Tile::kInWide);
        }
        float sums[2][4] = {};
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            uint32_t a[4];
            load_matrices(a, taps + rows[k]);
            multiply_add(sums[0], a, input[2 * k], input[2 * k + 1], T{});
            multiply_add(sums[1], a, input[2 * k + 4], input[2 * k + 5], T{});
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            store_pair(to + half * 128, sums[half][0], sums[half][1]);
            store_pair(to + half * 128 + 64, sums[half][2], sums[half][3]);
        }
        taps += Tile::kTapChannel;
        map += Tile::kMap;
        to += Tile::kConvolved;
    }
}

// Step 2 of float: a thread makes 4 x 2 pixels of a channel.
template <class T, int C>
IPT_FAST_DEVICE void leffn_convolve_float(LeffnTile<T, C>& tile) {
    using Tile = LeffnTile<T, C>;
    static_assert(Tile::kChunk * Tile::kPixels == kLeffnThreads * 8);
    const int channel = thread_index() / 16, column = thread_index() % 4 * 4, row = thread_index() % 16 / 4 * 2;
    float taps[25], sums[2][4] = {};
#pragma unroll
    for (int i = 0; i < 25; ++i) {
        taps[i] = as_float(tile.taps[channel * 25 + i]);
    }
#pragma unroll
    for (int i = 0; i < 6; ++i) {
        const T* from = tile.map + channel * Tile::kMap + (row + i) * Tile::kInWide + column;
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

// The row of a tile's pixel in the products, which is where step 2 leaves it.
template <class T>
IPT_FAST_DEVICE int leffn_row(int y, int x) {
    return sizeof(T) == 4 ? y * 16 + x : y / 4 % 2 * 128 + (y % 4 * 4 + x % 4) * 8 + y / 8 * 4 + x / 4;
}

// Step 3, of this warp's rows.
template <class T, int C>
IPT_FAST_DEVICE void leffn_project(Sums<LeffnTile<T, C>::kRows, C>& sums, const LeffnTile<T, C>& tile, const T* weights,
                                   bool tf32) {
    using Tile = LeffnTile<T, C>;
    constexpr int down = Tile::kRows / 16;
#pragma unroll
    for (int k = 0; k < Tile::kChunk; k += depth<T>()) {
        BlockA rows[down];
#pragma unroll
        for (int i = 0; i < down; ++i) {
            const T* from = tile.convolved + k * Tile::kConvolved + warp_index() * Tile::kRows + i * 16;
            rows[i] = load_a_transposed(from, Tile::kConvolved);
        }
#pragma unroll
        for (int j = 0; j < C / 16; ++j) {
            const BlockB b = load_b(weights + j * 16 * Tile::kProject + k, Tile::kProject);
#pragma unroll
            for (int i = 0; i < down; ++i) {
                multiply_add<T>(sums.values[i][j], rows[i], b, tf32);
            }
        }
    }
}

template <class T, int C>
IPT_FAST_DEVICE void leffn_wide(const LeffnParams& p) {
    using Tile = LeffnTile<T, C>;
    auto& tile = *shared_memory<Tile>();
    const LeffnPlace place = leffn_place<Tile>(p);
    const T* x = static_cast<const T*>(p.x);
    const T *expand = static_cast<const T*>(p.expand), *project = static_cast<const T*>(p.project);
    const T* depthwise = static_cast<const T*>(p.depthwise);
    const int chunks = p.hidden / Tile::kChunk;

    // Buffer n % 2 gets chunk n of the projection and n + 1 of the expansion.
    auto copy_weights = [&](int chunk) {
        if (chunk >= 0 && chunk < chunks) {
            leffn_copy_rows<Tile, Tile::kProject, C, Tile::kChunk>(tile.project[chunk & 1],
                                                                   project + chunk * Tile::kChunk, p.hidden);
        }
        if (chunk + 1 < chunks) {
            leffn_copy_rows<Tile, Tile::kExpand, Tile::kChunk, C>(
                tile.expand[chunk & 1], expand + (int64_t)(chunk + 1) * (Tile::kChunk * C), C);
        }
    };
    leffn_load_input<T, C>(tile, x, place);
    copy_weights(-1);
    copy_commit();
    copy_weights(0);
    copy_commit();
    leffn_load_norm<T, C>(tile, p);
    LeffnTaps<T, C> taps;
    taps.load(depthwise);
    taps.store(tile.taps);
    taps.store_zeros(tile.taps);
    copy_wait<1>();
    sync_block();
    if (p.norm_weight != nullptr) {
        leffn_normalise<T, C>(tile, p, place);
        sync_block();
    }
    leffn_expand<T, C>(tile, tile.expand[1], p.tf32);

    Sums<Tile::kRows, C> sums;
    sums.clear();
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
        sync_block();
        copy_weights(chunk + 1);
        copy_commit();
        if constexpr (Tile::kSmall) {
            leffn_convolve_small<T, C>(tile);
        } else {
            leffn_convolve_float<T, C>(tile);
        }
        copy_wait<1>();
        sync_block();
        const bool more = chunk + 1 < chunks;
        const T* next_taps = depthwise + (int64_t)(chunk + 1) * Tile::kChunk * 25;
        if (more && Tile::kBlocks == 1) {
            taps.load(next_taps);  // early, while there are registers for them
        }
        // Of the two warps of a scheduler one begins with either, so that they keep different units busy.
#pragma unroll 1
        for (int step = 0; step < 2; ++step) {
            if (step == warp_index() / 4 % 2) {
                leffn_project<T, C>(sums, tile, tile.project[chunk & 1], p.tf32);
            } else if (more) {
                leffn_expand<T, C>(tile, tile.expand[chunk & 1], p.tf32);
            }
        }
        if (more) {
            if (Tile::kBlocks > 1) {
                taps.load(next_taps);
            }
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
    constexpr int values = Vector<T>::kValues;
    for_vectors<Tile::kHigh, Tile::kWide, C / values>([&](int row, int column, int vector) {
        if (place.inside(row, column)) {
            const int64_t at = place.pixel(row, column) * C + vector * values;
            const float* from = staged + leffn_row<T>(row, column) * Tile::kStaged + vector * values;
            float y[values] = {};
            if (p.residual) {
                Vector<T>::load(x + at).unpack(y);
            }
#pragma unroll
            for (int v = 0; v < values; ++v) {
                y[v] += from[v];
            }
            Vector<T>::of(y).store_global(static_cast<T*>(p.y) + at);
        }
    });
}

// The tile of a block.
template <class T, int C>
using LeffnBlock = std::conditional_t<sizeof(T) == 2, LeffnSmallTile<T, C>, LeffnTile<T, C>>;

template <class T, int C>
IPT_FAST_KERNEL IPT_FAST_BOUNDS((LeffnBlock<T, C>::kThreads), (LeffnBlock<T, C>::kBlocks))
    leffn_kernel(IPT_FAST_PARAMS(LeffnParams) p) {
    if constexpr (sizeof(T) == 2) {
        leffn_small<T, C>(p);
    } else {
        leffn_wide<T, C>(p);
    }
}

}  // namespace ipt_fast
