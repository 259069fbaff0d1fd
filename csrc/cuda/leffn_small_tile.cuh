// What the feed-forward network's kernel in 16 bits has in shared memory, and how its input, weights and taps come
// there: see leffn_small.cuh.
#pragma once

#include "leffn_parts.cuh"

namespace ipt_fast::cuda {

// The input of 8 pixels. As it comes from memory lane i has pixel i / 4, and of every kGroup channels the kLane from
// kLane (i % 4) on, two a word; as operands of products, for every 16 terms, two words as warp_tiles.cuh tells.
template <int C>
struct LeffnInput {
    static constexpr int kLane = C % 32 ? 4 : 8, kGroup = 4 * kLane, kWords = kLane / 2, kGroups = C / kGroup;
    uint32_t words[kGroups][kWords];

    IPT_FAST_DEVICE void to_operands() {
        const int lane = lane_index();
#pragma unroll
        for (int j = 0; j < kGroups; ++j) {
#pragma unroll
            for (int step = 1; step < kWords; step *= 2) {
                exchange(words[j], step, kWords == 4 ? step : 2);
            }
            if constexpr (kWords == 2) {
#pragma unroll
                for (int w = 0; w < 2; ++w) {
                    words[j][w] = shuffle_bits(words[j][w], (lane & ~3) + lane % 2 * 2 + lane / 2 % 2);
                }
            }
        }
    }

  private:
    static IPT_FAST_DEVICE uint32_t shuffle_bits(uint32_t word, int lane) {
        return as_bits(shuffle(as_float(word), lane));
    }
    // Word w + step of lanes without `bit` for word w of those with it.
    static IPT_FAST_DEVICE void exchange(uint32_t (&words)[kWords], int step, int bit) {
        const bool high = lane_index() & bit;
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
            if ((w & step) == 0) {
                const uint32_t other = shuffle_bits(high ? words[w] : words[w + step], lane_index() ^ bit);
                (high ? words[w] : words[w + step]) = other;
            }
        }
    }
};

template <class T, int C>
struct LeffnSmallTile {
    using Input = LeffnInput<C>;
    static constexpr int kWarps = 8;  // of either kind
    static constexpr int kThreads = 2 * kWarps * kWarp, kBlocks = 1;
    static constexpr int kWide = 16, kHigh = 16, kPixels = kWide * kHigh;
    static constexpr int kInWide = kWide + 4, kInHigh = kHigh + 4, kInPixels = kInWide * kInHigh;
    static constexpr int kChunk = 32, kRows = kPixels / kWarps;
    static constexpr int kUnits = 6, kLast = kWarps * kUnits * 8;  // 8 pixels each, of an expanding warp
    static_assert(kLast + 16 == kInPixels);
    // Values from one row to the next: neither stores of sums nor loads for products meet a bank twice.
    static constexpr int kMap = kInPixels + 8, kConvolved = kPixels + 8;
    static constexpr int kExpand = padded_row<T>(C), kProject = padded_row<T>(kChunk);
    // Of a channel its five rows of taps among eight values in all four places, between rows of zeros, as words.
    static constexpr int kTapRow = 4 * 4, kTapChannel = (1 + 5 + 1) * kTapRow;

    alignas(16) T map[2][kChunk * kMap];
    alignas(16) T convolved[2][kChunk * kConvolved];
    alignas(16) T expand[2][kChunk * kExpand];
    alignas(16) T project[2][C * kProject];
    alignas(16) T compact_taps[2][kChunk * 25];
    alignas(16) uint32_t taps[2][kChunk * kTapChannel];
    alignas(16) uint32_t last[2][Input::kGroups][kWarp * Input::kWords];  // the input of the last 16 pixels
    alignas(16) float norm_weight[C];
    alignas(16) float norm_bias[C];
    LeffnPlace place;  // for the end, as registers are few
    int zero;

    // 0, which the compiler does not know: what comes of it is computed where it is needed, not kept in registers.
    IPT_FAST_DEVICE int hidden_zero() const { return *static_cast<const volatile int*>(&zero); }
};

// Where of the tile's pixels with their halo this one lies in x, or nullptr.
template <class T, int C>
IPT_FAST_DEVICE const T* leffn_input_pixel(const T* x, const LeffnPlace& place, int pixel) {
    using Tile = LeffnSmallTile<T, C>;
    const int row = pixel / Tile::kInWide - 2, column = pixel % Tile::kInWide - 2;
    return place.inside(row, column) ? x + place.pixel(row, column) * C : nullptr;
}

template <class T, int C>
IPT_FAST_DEVICE void leffn_load(LeffnInput<C>& input, const T* pixel) {
    using Input = LeffnInput<C>;
#pragma unroll
    for (int j = 0; j < Input::kGroups; ++j) {
        if (pixel != nullptr) {
            load_words(input.words[j], pixel + j * Input::kGroup + lane_index() % 4 * Input::kLane);
        } else {
#pragma unroll
            for (int w = 0; w < Input::kWords; ++w) {
                input.words[j][w] = 0;
            }
        }
    }
}

// Outside of the image zeros stay.
template <class T, int C>
IPT_FAST_DEVICE void leffn_normalise(LeffnInput<C>& input, const LeffnSmallTile<T, C>& tile, const LeffnArguments& p,
                                     bool inside) {
    using Input = LeffnInput<C>;
    float sum = 0, squares = 0;
    auto values = [&](int i, float (&x)[2]) {
        const uint32_t word = input.words[i / Input::kWords][i % Input::kWords];
        x[0] = to_float(T{(uint16_t)word});
        x[1] = to_float(T{(uint16_t)(word >> 16)});
    };
#pragma unroll
    for (int i = 0; i < C / 8; ++i) {
        float x[2];
        values(i, x);
        sum += x[0] + x[1];
    }
    const float mean = sum_of_row(sum) * (1.0f / C);
#pragma unroll
    for (int i = 0; i < C / 8; ++i) {
        float x[2];
        values(i, x);
        squares = fmaf(x[0] - mean, x[0] - mean, squares);
        squares = fmaf(x[1] - mean, x[1] - mean, squares);
    }
    const float variance = sum_of_row(squares) * (1.0f / C), scale = inside ? reciprocal_root(variance + p.eps) : 0.0f;
    const float shift = p.centered ? mean : 0.0f;
#pragma unroll
    for (int i = 0; i < C / 8; ++i) {
        const int channel = i / Input::kWords * Input::kGroup + lane_index() % 4 * Input::kLane + i % Input::kWords * 2;
        float x[2], weight[2], bias[2];
        values(i, x);
        load_pair(tile.norm_weight + channel, weight[0], weight[1]);
        load_pair(tile.norm_bias + channel, bias[0], bias[1]);
#pragma unroll
        for (int v = 0; v < 2; ++v) {
            x[v] = fmaf((x[v] - shift) * scale, weight[v], inside ? bias[v] : 0.0f);
        }
        input.words[i / Input::kWords][i % Input::kWords] = pack<T>(x[0], x[1]);
    }
}

// Weights of a chunk, asynchronously, by the threads of one kind of warps; those of the projection in the order in
// which a lane's sums are neighbouring channels.
template <class T, int C>
IPT_FAST_DEVICE void leffn_copy_expand(T* to, const T* from, int thread) {
    using Tile = LeffnSmallTile<T, C>;
    constexpr int together = Tile::kThreads / 2 / Tile::kChunk * 8;
    const int row = thread / (together / 8), column = thread % (together / 8) * 8;
    const uint32_t offset = row * C + column;
    to += row * Tile::kExpand + column;
#pragma unroll
    for (int first = 0; first < C; first += together) {
        if (first + together <= C || first + column < C) {
            copy_async(to + first, from + (offset + first), true);
        }
    }
}
template <class T, int C>
IPT_FAST_DEVICE void leffn_copy_project(T* to, const T* from, int hidden, int thread) {
    using Tile = LeffnSmallTile<T, C>;
    using Input = LeffnInput<C>;
    constexpr int vectors = Tile::kChunk / 8, together = Tile::kThreads / 2 / vectors;
    static_assert(together % Input::kGroup == 0);
    const int channel = thread / vectors;
    const int place = channel % Input::kGroup, column = thread % vectors * 8;
    const int row = channel - place + place % Input::kLane / 2 * 8 + place / Input::kLane * 2 + place % 2;
    const uint32_t offset = channel * hidden + column;
    to += row * Tile::kProject + column;
#pragma unroll
    for (int first = 0; first < C; first += together) {
        if (first + together <= C || first + channel < C) {
            copy_async(to + first * Tile::kProject, from + (offset + first * hidden), true);
        }
    }
}

template <class T, int C>
IPT_FAST_DEVICE void leffn_copy_taps(T* to, const T* from, int thread) {
    using Tile = LeffnSmallTile<T, C>;
    static_assert(Tile::kChunk * 25 / 8 <= Tile::kThreads / 2);
    if (thread < Tile::kChunk * 25 / 8) {
        copy_async(to + thread * 8, from + thread * 8, true);
    }
}

// Taps for step 2, a row a thread.
template <class T, int C>
IPT_FAST_DEVICE void leffn_spread_taps(uint32_t* to, const T* from, int thread) {
    using Tile = LeffnSmallTile<T, C>;
    if (thread < Tile::kChunk * 5) {
        uint32_t bits[5];
#pragma unroll
        for (int i = 0; i < 5; ++i) {
            bits[i] = from[thread * 5 + i].bits;
        }
        const uint32_t even[5] = {0, bits[0] | bits[1] << 16, bits[2] | bits[3] << 16, bits[4], 0};
        const uint32_t odd[5] = {0, bits[0] << 16, bits[1] | bits[2] << 16, bits[3] | bits[4] << 16, 0};
        to += thread / 5 * Tile::kTapChannel + (1 + thread % 5) * Tile::kTapRow;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int place = (i + thread / 2) % 4;  // no two of eight neighbours write to the same banks
            uint32_t words[4];
#pragma unroll
            for (int w = 0; w < 4; ++w) {
                const uint32_t here = place % 2 ? odd[w + 1] : even[w + 1], before = place % 2 ? odd[w] : even[w];
                words[w] = place < 2 ? here : before;
            }
            store_words(to + place * 4, words);
        }
    }
}

}  // namespace ipt_fast::cuda
