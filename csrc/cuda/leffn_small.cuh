// The feed-forward network in 16 bits: half of a block's warps expand, the others convolve and project.
//
// A block makes a tile of 16 x 16 pixels in chunks of 32 hidden channels. In each span between two barriers
//   1. the expanding warps make chunk n of the tile with its halo of 2 pixels, 400 pixels: product and GELU, to the
//      hidden map [channel][pixel]. Each keeps its 48 pixels' input in registers; the last 16 pixels' lies in shared
//      memory, and four of the other warps take them;
//   2. the projecting warps convolve chunk n - 1, to [channel][pixel] again,
//   3. and add their 32 pixels' part of the projection of chunk n - 2 to sums in registers.
// Maps, weights and taps have two buffers each.
//
// The convolution is a product of matrices, too: of a channel, 4 x 4 pixels of output are its rows, the 8 x 8 pixels of
// input below them the terms, and 8 such patches the columns. 25 of the 64 products count, yet vector arithmetic would
// take four times the instructions.
//
// In memory a lane has kLane neighbouring channels of a pixel at once, so the products take channels in that order.
//
// Shared memory: for 32, 48, 64 and 96 channels 119, 124, 132 and 139 thousand bytes, 16 warps a multiprocessor.
// Memory a pixel: 1.56 C values in (the halo's from the cache), C out, and C more from the cache with a residual.
// Work a pixel for M hidden channels: 2 (1.56 + 1) C M FLOPs of products, 128 M of products for the convolution (of
// which 50 M count), 1.56 M GELUs of 8 instructions.
#pragma once

#include "leffn_small_tile.cuh"

namespace ipt_fast::cuda {

// GELU of 16 channels x 8 pixels, to the map from `to` on.
template <class T, int C>
IPT_FAST_DEVICE void leffn_activate(T* to, const float (&sums)[4]) {
    using Tile = LeffnSmallTile<T, C>;
    to += lane_index() / 4 * Tile::kMap + lane_index() % 4 * 2;
    store_pair(to, leffn_gelu<T>(sums[0]), leffn_gelu<T>(sums[1]));
    store_pair(to + 8 * Tile::kMap, leffn_gelu<T>(sums[2]), leffn_gelu<T>(sums[3]));
}

// Step 1, of an expanding warp's pixels.
template <class T, int C>
IPT_FAST_DEVICE void leffn_expand(T* map, const LeffnInput<C> (&input)[LeffnSmallTile<T, C>::kUnits],
                                  const T* weights) {
    using Tile = LeffnSmallTile<T, C>;
    using Input = LeffnInput<C>;
#pragma unroll 1
    for (int channel = 0; channel < Tile::kChunk; channel += 16) {
        float sums[Tile::kUnits][4] = {};
#pragma unroll
        for (int k = 0; k < C / 16; ++k) {
            const BlockA rows = load_a(weights + channel * Tile::kExpand + k * 16, Tile::kExpand);
#pragma unroll
            for (int i = 0; i < Tile::kUnits; ++i) {
                const auto& words = input[i].words[2 * k / Input::kWords];
                multiply_add(sums[i], rows.words, words[2 * k % Input::kWords], words[2 * k % Input::kWords + 1], T{});
            }
        }
        T* to = map + channel * Tile::kMap + warp_index() * Tile::kUnits * 8;
#pragma unroll
        for (int i = 0; i < Tile::kUnits; ++i) {
            leffn_activate<T, C>(to + i * 8, sums[i]);
        }
    }
}

// Step 1, of the last pixels: 16 channels x 8 of them.
template <class T, int C>
IPT_FAST_DEVICE void leffn_expand_last(T* map, const LeffnSmallTile<T, C>& tile, const T* weights, int part) {
    using Tile = LeffnSmallTile<T, C>;
    using Input = LeffnInput<C>;
    const int channel = part % 2 * 16, unit = part / 2;
    float sums[4] = {};
#pragma unroll
    for (int j = 0; j < Input::kGroups; ++j) {
        uint32_t input[Input::kWords];
        load_words(input, tile.last[unit][j] + lane_index() * Input::kWords);
#pragma unroll
        for (int w = 0; w < Input::kWords; w += 2) {
            const int k = j * Input::kGroup + w * 8;
            const BlockA rows = load_a(weights + channel * Tile::kExpand + k, Tile::kExpand);
            multiply_add(sums, rows.words, input[w], input[w + 1], T{});
        }
    }
    leffn_activate<T, C>(map + channel * Tile::kMap + Tile::kLast + unit * 8, sums);
}

// Step 2, a warp's part. Matrices of taps have a row for every pixel of a patch and as columns two rows of its input;
// those of a map have a column for every patch. Lane i has patch i / 4, in row i / 16 * 2 (+ 1, the second product),
// column i / 4 % 4 of the tile's 4 x 4 patches. Of the taps it needs those that the patch's pixel i / 4 (or, two rows
// below, i / 4 + 8, for which they are the same two rows of input later) takes from columns 2 (i % 4) and the next.
template <class T, int C>
IPT_FAST_DEVICE void leffn_convolve(T* convolved, const T* map, const uint32_t* taps, int warp) {
    using Tile = LeffnSmallTile<T, C>;
    constexpr int channels = Tile::kChunk / Tile::kWarps;
    const int lane = lane_index(), patch = lane / 4, pair = lane % 4 * 2;
    taps += warp * channels * Tile::kTapChannel + (1 - lane / 16) * Tile::kTapRow + lane % 16;
    map += warp * channels * Tile::kMap + patch / 4 * 8 * Tile::kInWide + patch % 4 * 4 + pair;
    convolved += warp * channels * Tile::kConvolved + patch * 8 + pair;
#pragma unroll 1
    for (int channel = 0; channel < channels; ++channel) {
        uint32_t rows[10] = {};  // taps for two rows above the patch's input, of the input's six upper, two lower rows
        uint32_t input[12];      // rows of the patch, and of the one below it
#pragma unroll
        for (int i = 0; i < 6; ++i) {
            rows[i + 2] = taps[i * Tile::kTapRow];
        }
#pragma unroll
        for (int i = 0; i < 12; ++i) {
            input[i] = *reinterpret_cast<const uint32_t*>(map + i * Tile::kInWide);
        }
        float sums[2][4] = {};
#pragma unroll
        for (int k = 0; k < 8; k += 2) {
            const uint32_t a[4] = {rows[k + 2], rows[k], rows[k + 3], rows[k + 1]};
            multiply_add(sums[0], a, input[k], input[k + 1], T{});
            multiply_add(sums[1], a, input[k + 4], input[k + 5], T{});
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            store_pair(convolved + half * 128, sums[half][0], sums[half][1]);
            store_pair(convolved + half * 128 + 64, sums[half][2], sums[half][3]);
        }
        taps += Tile::kTapChannel;
        map += Tile::kMap;
        convolved += Tile::kConvolved;
    }
}

// Step 3, of a warp's rows.
template <class T, int C>
IPT_FAST_DEVICE void leffn_project(WarpSums<LeffnSmallTile<T, C>::kRows, C>& sums, const T* convolved, const T* weights,
                                   int warp) {
    using Tile = LeffnSmallTile<T, C>;
    constexpr int down = Tile::kRows / 16;
#pragma unroll 1
    for (int k = 0; k < Tile::kChunk; k += 16) {
        BlockA rows[down];
#pragma unroll
        for (int i = 0; i < down; ++i) {
            rows[i] =
                load_a_transposed(convolved + k * Tile::kConvolved + warp * Tile::kRows + i * 16, Tile::kConvolved);
        }
#pragma unroll
        for (int j = 0; j < C / 16; ++j) {
            const BlockB b = load_b(weights + j * 16 * Tile::kProject + k, Tile::kProject);
#pragma unroll
            for (int i = 0; i < down; ++i) {
                multiply_add<T>(sums.values[i][j], rows[i], b, false);
            }
        }
    }
}

template <class T, int C>
IPT_FAST_DEVICE void leffn_expanding_warp(LeffnSmallTile<T, C>& tile, const LeffnArguments& p,
                                          const LeffnPlace& place) {
    using Tile = LeffnSmallTile<T, C>;
    const T *x = static_cast<const T*>(p.x), *weights = static_cast<const T*>(p.expand);
    const T *depthwise = static_cast<const T*>(p.depthwise), *project = static_cast<const T*>(p.project);
    const int chunks = p.hidden / Tile::kChunk;
    leffn_copy_expand<T, C>(tile.expand[0], weights, thread_index());
    leffn_copy_taps<T, C>(tile.compact_taps[0], depthwise, thread_index());
    copy_commit();
    LeffnInput<C> input[Tile::kUnits];
    uint32_t inside = 0;
#pragma unroll
    for (int i = 0; i < Tile::kUnits; ++i) {
        const int pixel = (warp_index() * Tile::kUnits + i) * 8 + lane_index() / 4;
        const T* from = leffn_input_pixel<T, C>(x, place, pixel);
        inside |= (uint32_t)(from != nullptr) << i;
        leffn_load<T, C>(input[i], from);
    }
    sync_block();
    // Always the first, that all others move up for: there are no registers for more at a time.
#pragma unroll 1
    for (int i = 0; i < Tile::kUnits; ++i) {
        LeffnInput<C> first = input[0];
        if (p.norm_weight != nullptr) {
            leffn_normalise<T, C>(first, tile, p, inside >> i & 1);
        }
        first.to_operands();
#pragma unroll
        for (int j = 1; j < Tile::kUnits; ++j) {
            input[j - 1] = input[j];
        }
        input[Tile::kUnits - 1] = first;
    }
    copy_wait<0>();
    sync_block();
#pragma unroll 1
    for (int span = 0; span < chunks + 2; ++span) {
        const int thread = thread_index() + tile.hidden_zero(), next = span + 1, convolved = span - 1;
        if (next < chunks) {
            leffn_copy_expand<T, C>(tile.expand[next & 1], weights + (int64_t)next * Tile::kChunk * C, thread);
            leffn_copy_taps<T, C>(tile.compact_taps[next & 1], depthwise + (int64_t)next * Tile::kChunk * 25, thread);
        }
        if (convolved >= 0 && convolved < chunks) {
            leffn_copy_project<T, C>(tile.project[convolved & 1], project + convolved * Tile::kChunk, p.hidden, thread);
        }
        copy_commit();
        if (span < chunks) {
            leffn_spread_taps<T, C>(tile.taps[span & 1], tile.compact_taps[span & 1], thread);
            leffn_expand<T, C>(tile.map[span & 1], input, tile.expand[span & 1]);
        }
        copy_wait<0>();
        sync_block();
    }
}

template <class T, int C>
IPT_FAST_DEVICE void leffn_projecting_warp(LeffnSmallTile<T, C>& tile, const LeffnArguments& p,
                                           const LeffnPlace& place) {
    using Tile = LeffnSmallTile<T, C>;
    using Input = LeffnInput<C>;
    int warp = warp_index() - Tile::kWarps;
    const int thread = thread_index() - Tile::kThreads / 2, lane = lane_index();
    const T* x = static_cast<const T*>(p.x);
    const int chunks = p.hidden / Tile::kChunk;
    if (thread == 0) {
        tile.place = place;
        tile.zero = 0;
    }
    if (thread < C && p.norm_weight != nullptr) {
        tile.norm_weight[thread] = small_value<T>(p.norm_weight, thread, p.narrow);
        tile.norm_bias[thread] = p.norm_bias != nullptr ? small_value<T>(p.norm_bias, thread, p.narrow) : 0.0f;
    }
    for (int i = thread; i < 2 * Tile::kChunk * Tile::kTapChannel / 4; i += Tile::kThreads / 2) {
        store_words(tile.taps[0] + i * 4, {0u, 0u, 0u, 0u});
    }
    sync_block();
    if (warp < 2) {
        LeffnInput<C> input;
        const T* from = leffn_input_pixel<T, C>(x, place, Tile::kLast + warp * 8 + lane / 4);
        leffn_load<T, C>(input, from);
        if (p.norm_weight != nullptr) {
            leffn_normalise<T, C>(input, tile, p, from != nullptr);
        }
        input.to_operands();
#pragma unroll
        for (int j = 0; j < Input::kGroups; ++j) {
            store_words(tile.last[warp][j] + lane * Input::kWords, input.words[j]);
        }
    }
    sync_block();

    WarpSums<Tile::kRows, C> sums;
    sums.clear();
#pragma unroll 1
    for (int span = 0; span < chunks + 2; ++span) {
        const int convolved = span - 1, projected = span - 2;
        warp += tile.hidden_zero();
        if (span < chunks && warp < 4) {
            leffn_expand_last<T, C>(tile.map[span & 1], tile, tile.expand[span & 1], warp);
        }
        if (convolved >= 0 && convolved < chunks) {
            const int buffer = convolved & 1;
            leffn_convolve<T, C>(tile.convolved[buffer], tile.map[buffer], tile.taps[buffer], warp);
        }
        if (projected >= 0) {
            leffn_project<T, C>(sums, tile.convolved[projected & 1], tile.project[projected & 1], warp);
        }
        sync_block();
    }

    const LeffnPlace there = tile.place;
#pragma unroll
    for (int i = 0; i < Tile::kRows / 8; ++i) {
        // A row of the products: the patches' row, the pixel in a patch, the patch, as step 2 left them.
        const int row = warp * Tile::kRows + i * 8, patch = lane / 4;
        const int y = patch / 4 * 8 + row / 128 * 4 + row % 128 / 32, column = patch % 4 * 4 + row / 8 % 4;
        if (there.inside(y, column)) {
            const int64_t at = there.pixel(y, column) * C + lane % 4 * Input::kLane;
#pragma unroll
            for (int j = 0; j < Input::kGroups; ++j) {
                uint32_t words[Input::kWords] = {};
                if (p.residual) {
                    load_words(words, x + at + j * Input::kGroup);
                }
#pragma unroll
                for (int w = 0; w < Input::kWords; ++w) {
                    const int block = j * Input::kWords + w;
                    const float* pair = &sums.values[i / 2][block / 2][block % 2][i % 2 * 2];
                    words[w] = pack<T>(to_float(T{(uint16_t)words[w]}) + pair[0],
                                       to_float(T{(uint16_t)(words[w] >> 16)}) + pair[1]);
                }
                store_global(static_cast<T*>(p.y) + at + j * Input::kGroup, words);
            }
        }
    }
}

template <class T, int C>
IPT_FAST_DEVICE void leffn_small(const LeffnArguments& p) {
    using Tile = LeffnSmallTile<T, C>;
    auto& tile = *shared_memory<Tile>();
    const LeffnPlace place = leffn_place<Tile>(p);
    if (warp_index() < Tile::kWarps) {
        leffn_expanding_warp<T, C>(tile, p, place);
    } else {
        leffn_projecting_warp<T, C>(tile, p, place);
    }
}

}  // namespace ipt_fast::cuda
