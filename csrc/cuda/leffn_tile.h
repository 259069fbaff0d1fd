// A tile of the feed-forward network in shared memory, and how its input and its taps come there: see leffn_kernel.h.
#pragma once

#include "ipt_fast/cuda/leffn.h"
#include "tiles.h"

namespace ipt_fast {

template <class T, int C>
struct LeffnTile {
    static constexpr bool kSmall = sizeof(T) == 2;
    static constexpr int kThreads = kLeffnThreads, kWarps = kThreads / kWarp;
    static constexpr int kBlocks = C <= 48 ? 2 : 1;  // a multiprocessor
    static constexpr int kWide = 16, kHigh = kSmall ? 16 : 8, kPixels = kWide * kHigh;
    static constexpr int kInWide = kWide + 4, kInHigh = kHigh + 4, kInPixels = kInWide * kInHigh;
    static constexpr int kChunk = kSmall ? 32 : 16, kRows = kPixels / kWarps;
    // Values from one row to the next; those of pixels so that stores of sums and loads for products meet no bank
    // twice.
    static constexpr int kInput = padded_row<T>(C), kMap = kInPixels + (kSmall ? 8 : 4), kConvolved = kPixels + 8;
    static constexpr int kExpand = padded_row<T>(C), kProject = padded_row<T>(kChunk), kStaged = C + 8;
    // In 16 bits, of a channel its five rows of taps among eight values in all four places, and then zeros, as words.
    static constexpr int kTapChannel = kSmall ? (5 * 4 + 1) * 4 : 25, kTaps = kChunk * kTapChannel;

    alignas(16) T input[kInPixels * kInput];
    alignas(16) T map[kChunk * kMap];
    alignas(16) T convolved[kChunk * kConvolved];
    alignas(16) T expand[2][kChunk * kExpand];
    alignas(16) T project[2][C * kProject];
    alignas(16) uint32_t taps[kTaps];
    alignas(16) float norm_weight[C];
    alignas(16) float norm_bias[C];
};

// x Phi(x). To be rounded to 16 bits: max(x, 0) - t Phi(-t) for t = |x|, with a polynomial for log2 Phi(-t) (minimax in
// the error of t Phi(-t), which is at most 6e-7, and at most 8e-5 of it for t below 3).
template <class T>
IPT_FAST_DEVICE float leffn_gelu(float x) {
    if constexpr (sizeof(T) == 4) {
        return 0.5f * x * (1.0f + erff(x * 0.70710678f));
    } else {
        const float t = fabsf(x);
        float p = fmaf(-4.8760764e-4f, t, 7.1942489e-3f);
        p = fmaf(p, t, -5.2131362e-2f);
        p = fmaf(p, t, -4.5962036e-1f);
        p = fmaf(p, t, -1.1509821f);
        p = fmaf(p, t, -1.0000051f);
        return fmaf(-t, power_of_two(p), fmaxf(x, 0.0f));
    }
}

// Where the tile lies; positions outside of the image are nullptr.
struct LeffnPlace {
    int64_t image;  // its first pixel
    int y, x, height, width;

    IPT_FAST_DEVICE bool inside(int row, int column) const {
        return y + row >= 0 && y + row < height && x + column >= 0 && x + column < width;
    }
    IPT_FAST_DEVICE int64_t pixel(int row, int column) const { return image + (int64_t)(y + row) * width + x + column; }
};

template <class Tile>
IPT_FAST_DEVICE LeffnPlace leffn_place(const LeffnParams& p) {
    const int across = (p.width + Tile::kWide - 1) / Tile::kWide, down = (p.height + Tile::kHigh - 1) / Tile::kHigh;
    const int64_t block = block_index(), row = block / across;
    return {row / down * p.height * p.width, (int)(row % down) * Tile::kHigh, (int)(block % across) * Tile::kWide,
            p.height, p.width};
}

// f(row, column, channel) for all vectors of a region of pixels, this thread's of every row in turn.
template <int Rows, int Columns, int Vectors, class F>
IPT_FAST_DEVICE void for_vectors(F f) {
    constexpr int across = Columns * Vectors, together = across < kLeffnThreads ? kLeffnThreads / across : 1;
    for (int n = thread_index(); n < together * across; n += kLeffnThreads) {
        const int column = n % across / Vectors, vector = n % Vectors;
#pragma unroll 2
        for (int row = n / across; row < Rows; row += together) {
            f(row, column, vector);
        }
    }
}

// copy_rows() of tiles.h, without a loop where there are registers for that, as this is done for every chunk.
template <class Tile, int Stride, int Rows, int Width, class T>
IPT_FAST_DEVICE void leffn_copy_rows(T* to, const T* from, int from_stride) {
    constexpr int values = Vector<T>::kValues, vectors = Width / values, all = Rows * vectors;
    if constexpr (Tile::kBlocks > 1) {
        copy_rows(to, Stride, Rows, Width, [&](int row) { return from + row * from_stride; });
    } else {
#pragma unroll
        for (int first = 0; first < all; first += kLeffnThreads) {
            const int i = first + thread_index(), row = i / vectors, column = i % vectors * values;
            if (first + kLeffnThreads <= all || i < all) {
                copy_async(to + row * Stride + column, from + (row * from_stride + column), true);
            }
        }
    }
}

// Asynchronous, to be committed.
template <class T, int C>
IPT_FAST_DEVICE void leffn_load_input(LeffnTile<T, C>& tile, const T* x, const LeffnPlace& place) {
    using Tile = LeffnTile<T, C>;
    constexpr int values = Vector<T>::kValues;
    for_vectors<Tile::kInHigh, Tile::kInWide, C / values>([&](int row, int column, int vector) {
        const bool there = place.inside(row - 2, column - 2);
        copy_async(tile.input + (row * Tile::kInWide + column) * Tile::kInput + vector * values,
                   there ? x + place.pixel(row - 2, column - 2) * C + vector * values : nullptr, there);
    });
}

template <class T, int C>
IPT_FAST_DEVICE void leffn_load_norm(LeffnTile<T, C>& tile, const LeffnParams& p) {
    if (p.norm_weight != nullptr && thread_index() < C) {
        const int i = thread_index();
        tile.norm_weight[i] = small_value<T>(p.norm_weight, i, p.narrow);
        tile.norm_bias[i] = p.norm_bias != nullptr ? small_value<T>(p.norm_bias, i, p.narrow) : 0.0f;
    }
}

// The norm of the tile's input, two threads a pixel. Outside of the image zeros stay.
template <class T, int C>
IPT_FAST_DEVICE void leffn_normalise(LeffnTile<T, C>& tile, const LeffnParams& p, const LeffnPlace& place) {
    using Tile = LeffnTile<T, C>;
    constexpr int values = Vector<T>::kValues, vectors = C / 2 / values;
    static_assert(Tile::kInPixels % 16 == 0);
    const int half = thread_index() % 2;
#pragma unroll 1
    for (int pixel = thread_index() / 2; pixel < Tile::kInPixels; pixel += kLeffnThreads / 2) {
        T* row = tile.input + pixel * Tile::kInput;
        float x[vectors][values];
        float sum = 0, squares = 0;
#pragma unroll
        for (int i = 0; i < vectors; ++i) {
            Vector<T>::load(row + (2 * i + half) * values).unpack(x[i]);
#pragma unroll
            for (int v = 0; v < values; ++v) {
                sum += x[i][v];
            }
        }
        const float mean = (sum + shuffle_xor(sum, 1)) * (1.0f / C);
#pragma unroll
        for (int i = 0; i < vectors * values; ++i) {
            const float centred = x[i / values][i % values] - mean;
            squares = fmaf(centred, centred, squares);
        }
        const float scale = 1.0f / sqrtf((squares + shuffle_xor(squares, 1)) * (1.0f / C) + p.eps);
        const float shift = p.centered ? mean : 0.0f;
        if (place.inside(pixel / Tile::kInWide - 2, pixel % Tile::kInWide - 2)) {
#pragma unroll
            for (int i = 0; i < vectors; ++i) {
                const int channel = (2 * i + half) * values;
#pragma unroll
                for (int v = 0; v < values; v += 4) {
                    float weight[4], bias[4];
                    Vector<float>::load(tile.norm_weight + channel + v).unpack(weight);
                    Vector<float>::load(tile.norm_bias + channel + v).unpack(bias);
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        x[i][v + j] = fmaf((x[i][v + j] - shift) * scale, weight[j], bias[j]);
                    }
                }
                Vector<T>::of(x[i]).store(row + channel);
            }
        }
    }
}

// A chunk's taps on their way from memory: a row for each of the first threads, or a value for each and some more.
template <class T, int C>
struct LeffnTaps {
    using Tile = LeffnTile<T, C>;
    static constexpr int kCount = Tile::kSmall ? 5 : (Tile::kTaps + kLeffnThreads - 1) / kLeffnThreads;
    T values[kCount];

    static IPT_FAST_DEVICE int index(int i) {
        return Tile::kSmall ? thread_index() * 5 + i : thread_index() + i * kLeffnThreads;
    }
    IPT_FAST_DEVICE void load(const T* from) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            values[i] = index(i) < Tile::kChunk * 25 ? from[index(i)] : from_float<T>(0);
        }
    }
    // Those beside the rows of taps, once.
    static IPT_FAST_DEVICE void store_zeros(uint32_t* taps) {
        if (Tile::kSmall && thread_index() < Tile::kChunk) {
            store_words(taps + (thread_index() + 1) * Tile::kTapChannel - 4, {0u, 0u, 0u, 0u});
        }
    }
    IPT_FAST_DEVICE void store(uint32_t* taps) const {
        if constexpr (Tile::kSmall) {
            if (thread_index() < Tile::kChunk * 5) {
                uint32_t bits[11] = {}, pairs[10];
#pragma unroll
                for (int i = 0; i < 5; ++i) {
                    bits[i + 3] = values[i].bits;
                }
#pragma unroll
                for (int i = 0; i < 10; ++i) {
                    pairs[i] = bits[i] | bits[i + 1] << 16;
                }
                uint32_t* to = taps + thread_index() / 5 * Tile::kTapChannel + thread_index() % 5 * 16;
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    store_words(to + i * 4, {pairs[3 - i], pairs[5 - i], pairs[7 - i], pairs[9 - i]});
                }
            }
        } else {
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
                if (index(i) < Tile::kTaps) {
                    taps[index(i)] = as_bits(to_float(values[i]));
                }
            }
        }
    }
};

}  // namespace ipt_fast
