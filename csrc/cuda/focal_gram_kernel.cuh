// Pass 1 of the focal attention layer: products and squared norms of q and k of both branches.
//
// A block of the map (p / 2 x p / 2 pixels) and head to a thread block, in tiles of at most 8 x 16 pixels (4 x 16 of
// float). For each tile: read x with a border of one pixel, normalise it, project it to the head's q and k in place,
// convolve it, again in place (a warp has 16 channels), add the squared norms, and multiply q^T k: of a warp is a
// branch and 16 channels of q. Token weights, squared, multiply the operand q.
//
// Bytes a pixel: x, C T (1.4 times from the second level cache, for every head), and 8 d (d + 2) heads / (p / 2)^2 of
// slots. FLOPs a pixel: tensor cores 1.5 * 4 C^2 + 4 C d, vector about 1.3 * 36 C. Shared memory, at C 96, d 48 and 16
// bits: pixels 40 KB, weights 20 KB, norms 6 KB: three blocks a multiprocessor.
#pragma once

#include <type_traits>

#include "focal_convolve.cuh"
#include "focal_tile.cuh"

namespace ipt_fast::cuda {

// The squared token weights of the branches, divided by the largest where that is needed.
struct alignas(8) BranchWeights {
    float of[2];
};

// The squared norms of eight channels: parts of those that convolve_rows() gives to the lane.
struct alignas(16) ChannelNorms {
    float of[2][2];  // branch, channel

    IPT_FAST_DEVICE void add(const BranchWeights& weights, float first, float second) {
#pragma unroll
        for (int branch = 0; branch < 2; ++branch) {
            of[branch][0] += weights.of[branch] * (first * first);
            of[branch][1] += weights.of[branch] * (second * second);
        }
    }
    // Times `most` to to[branch * step + channel]. Collective.
    IPT_FAST_DEVICE void store(float* to, int step, const float (&most)[2]) const {
        const int lane = lane_index();
#pragma unroll
        for (int v = 0; v < 4; ++v) {
            float sum = of[v / 2][v % 2];
#pragma unroll
            for (int mask = 4; mask < kWarp; mask *= 2) {
                sum += shuffle_xor(sum, mask);
            }
            if (lane < 4) {
                to[v / 2 * step + lane * 2 + v % 2] = sum * most[v / 2];
            }
        }
    }
};

template <class T, int C, int D>
struct GramShared {
    static constexpr int kThreads = 4 * D, kWarps = kThreads / kWarp;
    // Rows of pixels that a warp projects at once: all warps have as many of a tile's, and registers suffice.
    static constexpr int kUnit = D == 48 || C == 96 ? 16 : 48;
    static constexpr int kTokens = focal_tokens<T>();
    static constexpr int kWeights = (2 * kTokens + kThreads - 1) / kThreads;  // that a thread brings
    static constexpr int kStride = padded_row<T>(C > 2 * D ? C : 2 * D);
    static constexpr int kWeightStride = padded_row<T>(C);

    alignas(16) T pixels[focal_pixels<T>(kUnit) * kStride];  // then q and k
    alignas(16) T weight[2 * D * kWeightStride];
    FocalNorm<C> norm;
    alignas(16) T taps[9 * 2 * D];
    BranchWeights token_weight[kTokens];  // in rows of kFocalColumns, zeros where the tile has no token
    ChannelNorms norms[2][kThreads];      // of each thread's channels, as registers are few
    float most[2][kWarps];
    FocalBlock block;  // not in registers either
    int first, last;   // of its tiles
};

// Blocks of a multiprocessor: as many as registers suffice for, where there is the memory.
template <class T, int C, int D>
constexpr int gram_blocks() {
    constexpr int room = kMultiprocessorShared / (int)(sizeof(GramShared<T, C, D>) + 1024);
    constexpr int wanted = sizeof(T) == 4 ? 1 : (D == 48 ? 3 : 4) - std::is_same_v<T, fp16>;
    return room < wanted ? room : wanted;
}

// The largest squared token weight of each branch in a block, 1 if that is 0. By the whole block.
template <class T, int Warps>
IPT_FAST_DEVICE void most_weight(float (&most)[2], float (&shared)[2][Warps], const FocalAttentionLayerArguments& p,
                                 const FocalBlock& block, int64_t head_weight) {
    const int window = p.vertical.window;
#pragma unroll
    for (int branch = 0; branch < 2; ++branch) {
        const int64_t first = head_weight + (int64_t)p.vertical.position(branch, block.down) * window +
                              p.horizontal.position(branch, block.across);
        float largest = 0;
        for (int y = warp_index(); y < block.rows; y += Warps) {
            for (int x = lane_index(); x < block.columns; x += kWarp) {
                const float w = small_value<T>(p.token_weight, first + (int64_t)y * window + x, p.narrow);
                const float square = w * w;
                largest = square > largest ? square : largest;
            }
        }
#pragma unroll
        for (int mask = kWarp / 2; mask > 0; mask /= 2) {
            const float other = shuffle_xor(largest, mask);
            largest = other > largest ? other : largest;
        }
        shared[branch][warp_index()] = largest;
    }
    sync_block();
#pragma unroll
    for (int branch = 0; branch < 2; ++branch) {
        float largest = 0;
        for (int i = 0; i < Warps; ++i) {
            largest = shared[branch][i] > largest ? shared[branch][i] : largest;
        }
        most[branch] = largest > 0 ? largest : 1.0f;
    }
}

// Columns of a block of A, which are tokens, times their weights.
template <class T>
IPT_FAST_DEVICE void scale_columns(BlockA& a, const BranchWeights* weights, int branch) {
    const int lane = lane_index();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        if constexpr (sizeof(T) == 2) {
            const int token = half * 8 + lane % 4 * 2;
            const float first = weights[token].of[branch], second = weights[token + 1].of[branch];
#pragma unroll
            for (int w = 2 * half; w < 2 * half + 2; ++w) {
                const float low = to_float(T{(uint16_t)a.words[w]}), high = to_float(T{(uint16_t)(a.words[w] >> 16)});
                a.words[w] = pack<T>(low * first, high * second);
            }
        } else {
            const float weight = weights[half * 4 + lane % 4].of[branch];
#pragma unroll
            for (int w = 2 * half; w < 2 * half + 2; ++w) {
                a.words[w] = as_bits(as_float(a.words[w]) * weight);
            }
        }
    }
}

// store_pair(), and the values become what is stored.
template <class T>
IPT_FAST_DEVICE void store_rounded(T* to, float& first, float& second) {
    if constexpr (sizeof(T) == 2) {
        const uint32_t word = pack<T>(first, second);
        *reinterpret_cast<uint32_t*>(to) = word;
        first = to_float(T{(uint16_t)word});
        second = to_float(T{(uint16_t)(word >> 16)});
    } else {
        store_pair(to, first, second);
    }
}

// Channels of q or k of up to four rows of a tile, from row y0, and their norms. Collective.
template <class T, int C, int D>
IPT_FAST_DEVICE void convolve_tokens(GramShared<T, C, D>& shared, const FocalTile& tile, int y0, int channel,
                                     ChannelNorms& stored) {
    using S = GramShared<T, C, D>;
    const int across = tile.columns + 2, rows = tile.rows - y0 < kConvolvedRows ? tile.rows - y0 : kConvolvedRows;
    ChannelNorms norms = stored;
    convolve_rows(shared.pixels + y0 * across * S::kStride + channel, S::kStride, across, tile.columns, rows,
                  shared.taps + channel, 2 * D, [&](int y, int x, int i, float first, float second) {
                      store_rounded(shared.pixels + ((y0 + y) * across + x) * S::kStride + channel + i, first, second);
                      norms.add(shared.token_weight[(y0 + y) * kFocalColumns + x], first, second);
                  });
    stored = norms;
}

template <class T, int C, int D>
IPT_FAST_KERNEL IPT_FAST_BOUNDS(4 * D, (gram_blocks<T, C, D>()))
    focal_gram_kernel(IPT_FAST_ARGUMENTS(FocalAttentionLayerArguments) p) {
    using S = GramShared<T, C, D>;
    constexpr int heads = C / D;
    S& shared = *shared_memory<S>();
    const int head = (int)(block_index() % heads), rest = (int)(block_index() / heads);
    const FocalBlock& block = shared.block;
    if (thread_index() == 0) {
        shared.block = FocalBlock::at(p, rest / p.splits, focal_rows<T>());
        shared.first = block.first(rest % p.splits, p.splits);
        shared.last = block.first(rest % p.splits + 1, p.splits);
    }

    const T* weight = static_cast<const T*>(p.qkv_weight);
    const auto channel = [&](int i) { return (i < D ? 0 : C - D) + head * D + i; };
    copy_rows(shared.weight, S::kWeightStride, 2 * D, C, [&](int row) { return weight + channel(row) * C; });
    copy_commit();
    load_small<T, C, 2 * D, S::kThreads>(p, shared.norm, shared.taps, channel);
    const int window = p.vertical.window;
    const int64_t head_weight = (int64_t)head * window * window;
    float most[2] = {1, 1};                   // by selection: memory would be needed to index registers
    if constexpr (std::is_same_v<T, fp16>) {  // q times a weight above 1 could overflow
        sync_block();
        most_weight<T>(most, shared.most, p, block, head_weight);
    }
    copy_wait<0>();
    sync_block();

    const int branch = warp_index() / (D / 16), first_q = warp_index() % (D / 16) * 16;
    WarpSums<16, D> gram;
    gram.clear();
    shared.norms[0][thread_index()] = shared.norms[1][thread_index()] = {};
    const int own = warp_index() * 2 * kConvolvedChannels;  // channels of the convolution
    static_assert(S::kWarps * 2 * kConvolvedChannels == 2 * D);
#pragma unroll 1
    for (int i = shared.first; i < shared.last; ++i) {
        const FocalTile tile = FocalTile::at(block, i);
        copy_pixels<T, C>(shared.pixels, S::kStride, p, block.image, tile);
        copy_commit();
        float weights[S::kWeights];
#pragma unroll
        for (int n = 0; n < S::kWeights; ++n) {
            const int j = n * S::kThreads + thread_index(), of = j / S::kTokens;
            const int y = j % S::kTokens / kFocalColumns, x = j % kFocalColumns;
            weights[n] = 0;
            if (j < 2 * S::kTokens && y < tile.rows && x < tile.columns) {
                const int64_t at_y = p.vertical.position(of, block.down) + tile.top + y;
                const int64_t at = at_y * window + p.horizontal.position(of, block.across) + tile.left + x;
                weights[n] = small_value<T>(p.token_weight, head_weight + at, p.narrow);
            }
        }
#pragma unroll
        for (int n = 0; n < S::kWeights; ++n) {
            const int j = n * S::kThreads + thread_index(), of = j / S::kTokens;
            if (j < 2 * S::kTokens) {
                shared.token_weight[j % S::kTokens].of[of] = weights[n] * weights[n] / (of == 0 ? most[0] : most[1]);
            }
        }
        copy_wait<0>();
        normalise_pixels<T, C, 2>(shared.pixels, S::kStride, p, tile, shared.norm);
        sync_block();
        project_in_place<T, C, 2 * D, S::kUnit>(shared.pixels, S::kStride, tile.pixels(), shared.weight,
                                                S::kWeightStride, p.tf32);
        sync_block();
#pragma unroll 1
        for (int y0 = 0; y0 < tile.rows; y0 += kConvolvedRows) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                convolve_tokens(shared, tile, y0, own + half * kConvolvedChannels, shared.norms[half][thread_index()]);
            }
        }
        sync_block();
        // Columns beyond the last repeat it, as zeros times any other could be no zeros.
        const auto at = [&](int y, int x) {
            const int column = x < tile.columns ? x : tile.columns - 1;
            return shared.pixels + (y * (tile.columns + 2) + column) * S::kStride;
        };
#pragma unroll 1
        for (int y = 0; y < tile.rows; ++y) {
#pragma unroll
            for (int x = 0; x < kFocalColumns; x += depth<T>()) {
                BlockA q = load_a_transposed<T>([&](int i) { return at(y, x + i) + first_q; });
                scale_columns<T>(q, shared.token_weight + y * kFocalColumns + x, branch);
#pragma unroll
                for (int j = 0; j < D / 16; ++j) {
                    const BlockB k = load_b_transposed<T>([&](int i) { return at(y, x + i) + D + j * 16; });
                    multiply_add<T>(gram.values[0][j], q, k, p.tf32);
                }
            }
        }
        sync_block();
    }

    float* slot = p.slots + block_index() * focal_slot(D);
    const float scale = branch == 0 ? most[0] : most[1];
    gram.for_pairs([&](int i, int j, const float* pair) {
        store_global(slot + (branch * D + first_q + i) * D + j, {as_bits(pair[0] * scale), as_bits(pair[1] * scale)});
    });
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        shared.norms[half][thread_index()].store(slot + 2 * D * D + own + half * kConvolvedChannels, 2 * D, most);
    }
}

}  // namespace ipt_fast::cuda
