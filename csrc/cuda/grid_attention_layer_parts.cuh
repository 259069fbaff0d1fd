// What a block of the grid attention layer does besides attention: weights, pixels, norm, products with weights.
#pragma once

#include "lattice_attention.cuh"

namespace ipt_fast::cuda {

template <class T, int Channels, int Width, int Side>
struct GridLayer {
    static constexpr int kChannels = Channels, kWidth = Width, kSide = Side;
    static constexpr bool kShort = sizeof(T) == 2;
    static constexpr int kTokens = Side * Side, kHeads = Channels / Width;
    static constexpr int kDown = kShort && Side == 16 ? 2 : 1, kChunk = 32;
    static constexpr int kGroups = kShort && Side == 8 ? 2 : 1;
    static constexpr int kStage = kShort ? kGroups * kTokens : 64;  // tokens whose y, k and v are there at a time
    static constexpr int kStages = kGroups * kTokens / kStage;
    static constexpr int kWarps = kShort || Side == 16 ? 8 : 4, kThreads = kWarps * kWarp;
    static constexpr int kRows = 16 * kDown, kQueries = kWarps * kRows;  // of a warp, of a block
    static constexpr int kParts = kGroups * kTokens / kQueries;          // blocks that share a group
    static constexpr int kOwn = kStage / kWarps;                         // tokens that a warp gathers and normalises
    static constexpr int kBlocks = !kShort ? 1 : Side == 8 ? (Channels == 96 ? 1 : 2) : 1;

    static constexpr int kPixel = padded_row<T>(Channels), kHead = padded_row<T>(Width);

    // A lane's sums of kSpan / 8 blocks of 8 columns are made to be neighbouring channels, by the order of the weights'
    // rows: kHeld values, 16 bytes if possible.
    static constexpr int kSpan = kShort && Channels % 32 == 0 ? 32 : 16, kHeld = kSpan / 4, kSpans = Channels / kSpan;

    struct Shared {
        alignas(16) T y[kStage * kPixel];
        alignas(16) T k[kStage * kHead];
        alignas(16) T v[kStage * kHead];
        alignas(16) T qkv_weight[3 * Width * kPixel];
        alignas(16) T project_weight[Channels * kHead];
        BiasPair biases[kHeads * kBiasCount<Side>];
    };

    using Attention = LatticeAttention<T, Width, Side, kDown, kChunk>;
};

// sums += a b as multiply() of warp_tiles.cuh has it, for `Down` blocks of 16 rows.
template <class T, int Depth, int Down, int Columns>
IPT_FAST_DEVICE void multiply_rows(WarpSums<16, Columns> (&sums)[Down], const T* a, int a_stride, const T* b,
                                   int b_stride, bool tf32) {
    constexpr int step = sizeof(T) == 2 ? 16 : 8;
#pragma unroll(sizeof(T) == 2 ? Depth / step : 1)  // exact products of float are long
    for (int k = 0; k < Depth; k += step) {
        BlockA rows[Down];
#pragma unroll
        for (int i = 0; i < Down; ++i) {
            rows[i] = load_a(a + i * 16 * a_stride + k, a_stride);
        }
#pragma unroll
        for (int j = 0; j < Columns / 16; ++j) {
            const BlockB block = load_b(b + j * 16 * b_stride + k, b_stride);
#pragma unroll
            for (int i = 0; i < Down; ++i) {
                multiply_add<T>(sums[i].values[0][j], rows[i], block, tf32);
            }
        }
    }
}

template <class T, class Layer>
IPT_FAST_DEVICE void copy_qkv_weight(T* to, const GridAttentionLayerArguments& p, int head) {
    const T* from = static_cast<const T*>(p.qkv_weight) + (int64_t)head * Layer::kWidth * Layer::kChannels;
    copy_rows(to, Layer::kPixel, 3 * Layer::kWidth, Layer::kChannels, [&](int row) {
        return from + (row / Layer::kWidth * Layer::kChannels + row % Layer::kWidth) * Layer::kChannels;
    });
}

template <class T, class Layer>
IPT_FAST_DEVICE void copy_project_weight(T* to, const GridAttentionLayerArguments& p, int head) {
    const T* from = static_cast<const T*>(p.project_weight) + head * Layer::kWidth;
    copy_rows(to, Layer::kHead, Layer::kChannels, Layer::kWidth, [&](int row) {
        const int in_span = row % Layer::kSpan;  // column 2 m + v of block j gets channel m kSpan / 4 + 2 j + v
        return from + (row - in_span + in_span % 8 / 2 * (Layer::kSpan / 4) + in_span / 8 * 2 + in_span % 2) *
                          Layer::kChannels;
    });
}

// The pixels of kOwn tokens from `first` on, by the warp.
template <class T, class Layer>
IPT_FAST_DEVICE void gather(T* to, const T* x, const Points& points, int first) {
    constexpr int vector = 16 / sizeof(T), vectors = Layer::kChannels / vector;
    static_assert(Layer::kOwn * vectors % kWarp == 0);
#pragma unroll 1
    for (int i = 0; i < Layer::kOwn * vectors / kWarp; ++i) {
        const int piece = i * kWarp + lane_index(), row = piece / vectors, column = piece % vectors * vector;
        const bool there = points.has<Layer::kSide>(first + row);
        const T* from = there ? x + points.pixel<Layer::kSide>(first + row) * Layer::kChannels + column : nullptr;
        copy_async(to + row * Layer::kPixel + column, from, there);
    }
}

// The norm's parameters to the padding of y's rows: weights of channels 2 i and 2 i + 1, then biases, in row i. By the
// whole block.
template <class T, class Layer>
IPT_FAST_DEVICE void load_norm(T* y, const GridAttentionLayerArguments& p) {
    static_assert(Layer::kChannels / 2 <= Layer::kStage && Layer::kPixel - Layer::kChannels == Vector<T>::kValues);
    for (int i = thread_index(); i < Layer::kChannels / 2; i += Layer::kThreads) {
        uint32_t words[4];
#pragma unroll
        for (int v = 0; v < 2; ++v) {
            words[v] = as_bits(small_value<T>(p.norm_weight, 2 * i + v, p.narrow));
            words[2 + v] = as_bits(p.norm_bias == nullptr ? 0.0f : small_value<T>(p.norm_bias, 2 * i + v, p.narrow));
        }
        store_words(y + i * Layer::kPixel + Layer::kChannels, words);
    }
}

// norm(x) in place of x, zeros where the group has no point; by the warp, four lanes a row. `y` has the parameters.
template <class T, class Layer>
IPT_FAST_DEVICE void normalise(T* rows, const T* y, const GridAttentionLayerArguments& p, const Points& points,
                               int first) {
    constexpr int pairs = Layer::kChannels / 8;
    const int lane = lane_index(), column = lane % 4 * 2;
#pragma unroll 1
    for (int start = 0; start < Layer::kOwn; start += 8) {
        T* row = rows + (start + lane / 4) * Layer::kPixel + column;
        float x[pairs][2], sum = 0, squares = 0;
#pragma unroll
        for (int i = 0; i < pairs; ++i) {
            load_pair(row + i * 8, x[i][0], x[i][1]);
            sum += x[i][0] + x[i][1];
        }
        const float mean = sum_of_row(sum) * (1.0f / Layer::kChannels);
#pragma unroll
        for (int i = 0; i < pairs; ++i) {
            const float left = x[i][0] - mean, right = x[i][1] - mean;
            squares += left * left + right * right;
        }
        const float scale = 1.0f / sqrtf(sum_of_row(squares) * (1.0f / Layer::kChannels) + p.eps);
        const float shift = p.centered ? mean : 0.0f;
        const bool there = points.has<Layer::kSide>(first + start + lane / 4);
#pragma unroll
        for (int i = 0; i < pairs; ++i) {
            float pair[2];
            uint32_t norm[4];
            load_words(norm, y + (i * 4 + lane % 4) * Layer::kPixel + Layer::kChannels);
#pragma unroll
            for (int v = 0; v < 2; ++v) {
                pair[v] = (x[i][v] - shift) * scale * as_float(norm[v]) + as_float(norm[2 + v]);
            }
            store_pair(row + i * 8, there ? pair[0] : 0.0f, there ? pair[1] : 0.0f);
        }
    }
}

// sums = the attended values times 16 rows of the head's output weights.
template <class T, class Attention, int Down>
IPT_FAST_DEVICE void project(float (&sums)[Down][2][4], const Attention& attention, const T* weight, bool tf32) {
#pragma unroll
    for (int step = 0; step < Attention::kSteps; ++step) {
        const BlockB block = load_b(weight + step * Attention::kDepth, Attention::kStride);
#pragma unroll
        for (int i = 0; i < Down; ++i) {
            multiply_add<T>(sums[i], attention.operands[i][step], block, tf32);
        }
    }
}

// Of a warp's tokens x, to which the heads' products are added: values of 16 bits between heads, as more would not fit
// in the registers.
template <class T, class Layer>
struct OutRows {
    using Words = uint32_t[Layer::kHeld / 2];
    Words held[Layer::kDown * 2][Layer::kSpans];

    // to(row) or from(row) is a row of the warp's tokens; to() nullptr if there is none.
    template <class From>
    IPT_FAST_DEVICE void load(From from) {
        for_words([&](int row, int column, Words& words) { load_words(words, from(row) + column); });
    }
    template <class To>
    IPT_FAST_DEVICE void store(To to) {
        for_words([&](int row, int column, const Words& words) {
            T* at = to(row);
            if (at != nullptr) {
                store_global(at + column, words);
            }
        });
    }

    IPT_FAST_DEVICE void add_projection(const typename Layer::Attention& attention, const T* weight) {
        constexpr int columns = Layer::kSpan / 8;
#pragma unroll
        for (int j = 0; j < Layer::kChannels / 16; ++j) {
            float sums[Layer::kDown][2][4];
#pragma unroll
            for (int i = 0; i < Layer::kDown * 4; ++i) {
                const int column = j * 2 + i / 2 % 2;
                const uint32_t word = held[i / 4 * 2 + i % 2][column / columns][column % columns];
                sums[i / 4][i / 2 % 2][i % 2 * 2] = to_float(T{(uint16_t)word});
                sums[i / 4][i / 2 % 2][i % 2 * 2 + 1] = to_float(T{(uint16_t)(word >> 16)});
            }
            project(sums, attention, weight + j * 16 * Layer::kHead, false);
#pragma unroll
            for (int i = 0; i < Layer::kDown * 4; ++i) {
                const int column = j * 2 + i / 2 % 2;
                const float* pair = sums[i / 4][i / 2 % 2] + i % 2 * 2;
                held[i / 4 * 2 + i % 2][column / columns][column % columns] = pack<T>(pair[0], pair[1]);
            }
        }
    }

  private:
    template <class F>
    IPT_FAST_DEVICE void for_words(F f) {
        const int lane = lane_index();
#pragma unroll
        for (int n = 0; n < Layer::kDown * 2; ++n) {
#pragma unroll
            for (int span = 0; span < Layer::kSpans; ++span) {
                f(n * 8 + lane / 4, span * Layer::kSpan + lane % 4 * Layer::kHeld, held[n][span]);
            }
        }
    }
};

// Of float: in memory, and in a short loop, as exact products are long. offset(row) is where to add or -1, to x or to
// what other heads have left in `out`.
template <class Layer, class Offset>
IPT_FAST_DEVICE void add_projection(float* out, const float* x, Offset offset,
                                    const typename Layer::Attention& attention, const float* weight, bool tf32) {
    static_assert(Layer::kDown == 1 && Layer::kSpan == 16);
    const int64_t offsets[2] = {offset(lane_index() / 4), offset(lane_index() / 4 + 8)};
#pragma unroll 1
    for (int j = 0; j < Layer::kSpans; ++j) {
        float sums[1][2][4] = {};
        project(sums, attention, weight + j * 16 * Layer::kHead, tf32);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int64_t at = offsets[half] + j * 16 + lane_index() % 4 * 4;
            if (offsets[half] >= 0) {
                float values[4];
                Vector<float>::load(x + at).unpack(values);
#pragma unroll
                for (int v = 0; v < 4; ++v) {
                    values[v] += sums[0][v / 2][half * 2 + v % 2];
                }
                Vector<float>::of(values).store_global(out + at);
            }
        }
    }
}

}  // namespace ipt_fast::cuda
