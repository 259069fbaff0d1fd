// The layer x + gate * project(attention(qkv(norm(x)))) at the level it is compiled for.
//
// Groups are independent of each other, so a block of a few of them runs from x to the output in scratch memory, where
// a row is a channel and a column a token: pixels of x are gathered and normalised; q, k and v of all heads are
// computed from them; each head attends (group_attend.h), and its result takes the place of its q; all are projected, x
// is added, and the columns go back to their pixels. Traffic: x is read and the output written, 2 * channels values a
// pixel; the x added at the end is still in a cache. FLOP a pixel: 8 * channels^2 for the projections, 4 * tokens *
// channels for the attention.
#include "attention_layer_kernel.h"

#include "group_attend.h"
#include "left_weights.h"

namespace ipt_fast::cpu {
namespace {

// The weights of q, k and v, then the projection's.
template <typename Unit>
int64_t packed_size(const AttentionLayerParams& p, const Unit& unit) {
    const LeftWeights weights(unit, channels_of(p));
    return (3 * channels_of(p) + weights.readable(channels_of(p))) * weights.row_bytes();
}

template <typename T, typename Unit>
void pack(const AttentionLayerParams& p, const Unit& unit, int64_t begin, int64_t end) {
    const int64_t channels = channels_of(p);
    const LeftWeights weights(unit, channels);
    for (int64_t i = begin; i < end; ++i) {
        const T* const source = static_cast<const T*>(i < 3 * channels ? p.qkv : p.project);
        weights.pack(source + i % (3 * channels) * channels, static_cast<char*>(p.packed) + i * weights.row_bytes());
    }
}

// Consecutive groups of one image.
struct GroupBlock {
    int64_t image, first, last;  // groups, counted through the batch

    GroupBlock(const AttentionLayerParams& p, int64_t index) : image(index / blocks_of_image(p)) {
        const int64_t begin = index % blocks_of_image(p) * p.block_groups, groups = p.queries.count();
        const int64_t end = begin + p.block_groups;
        first = image * groups + begin;
        last = image * groups + (end < groups ? end : groups);
    }

    // body(group, its first column in the block); returns the number of columns.
    template <typename Body>
    int64_t for_groups(const AttentionLayerParams& p, const Body& body) const {
        int64_t start = 0;
        for (int64_t index = first; index < last; ++index) {
            const GroupPair group(p, index);
            body(group, start);
            start += padded(group.queries.tokens());
        }
        return start;
    }
};

// The sum of body(i) over the rows, for `count` vectors side by side: a few short sums round less than one long one.
template <int count, typename Body>
inline __attribute__((always_inline)) void sum_columns(int64_t rows, Vec (&sums)[count], const Body& body) {
    constexpr int64_t kBlock = 16;
    for (Vec& sum : sums) {
        sum = Vec{};
    }
    for (int64_t first = 0; first < rows; first += kBlock) {
        const int64_t last = first + kBlock < rows ? first + kBlock : rows;
        Vec parts[count]{};
        for (int64_t i = first; i < last; ++i) {
#pragma GCC unroll 4
            for (int j = 0; j < count; ++j) {
                parts[j] += body(i, j);
            }
        }
#pragma GCC unroll 4
        for (int j = 0; j < count; ++j) {
            sums[j] += parts[j];
        }
    }
}

// The layer norm of `count` vectors of tokens, in place.
template <int count>
inline void normalize_tokens(Matrix<float> tokens, const Norm& norm) {
    const int64_t rows = tokens.rows;
    const float part = 1.0f / static_cast<float>(rows);
    const auto value = [=](int64_t i, int j) __attribute__((always_inline)) { return tokens.row(i) + j * kLanes; };
    Vec mean[count], scale[count];
    sum_columns<count>(rows, mean, [=](int64_t i, int j) __attribute__((always_inline)) { return load(value(i, j)); });
#pragma GCC unroll 4
    for (Vec& each : mean) {
        each *= part;
    }
    sum_columns<count>(rows, scale, [&](int64_t i, int j) __attribute__((always_inline)) {
        const Vec difference = load(value(i, j)) - mean[j];
        return difference * difference;
    });
#pragma GCC unroll 4
    for (int j = 0; j < count; ++j) {
        scale[j] = 1.0f / sqrt(scale[j] * part + norm.eps);
        mean[j] = norm.centered ? mean[j] : Vec{};
    }
    for (int64_t i = 0; i < rows; ++i) {
        const Vec weight = broadcast(norm.weight[i]), bias = broadcast(norm.bias[i]);
#pragma GCC unroll 4
        for (int j = 0; j < count; ++j) {
            store(value(i, j), fma((load(value(i, j)) - mean[j]) * scale[j], weight, bias));
        }
    }
}

inline void normalize_tokens(Matrix<float> tokens, const Norm& norm) {
    int64_t c = 0;
    for (; c + 4 * kLanes <= tokens.columns; c += 4 * kLanes) {
        normalize_tokens<4>(tokens.from(0, c), norm);
    }
    for (; c < tokens.columns; c += kLanes) {
        normalize_tokens<1>(tokens.from(0, c), norm);
    }
}

template <typename T, typename Unit>
void forward(const AttentionLayerParams& p, const Unit& unit, int64_t begin, int64_t end, float* memory) {
    const int64_t channels = channels_of(p), depth = p.depth;
    const int64_t most_columns = block_columns(p), row = spread(most_columns);
    const LeftWeights weights(unit, channels);
    const auto* const project_weight = static_cast<const char*>(p.packed) + 3 * channels * weights.row_bytes();
    ScratchStack scratch{memory};
    int64_t* const list = reinterpret_cast<int64_t*>(scratch.take(2 * most_columns));
    float *const for_tokens = scratch.take(channels * row), *const for_qkv = scratch.take(3 * channels * row);
    float* const room = scratch.take(packed_floats(p.dtype, p.brgemm, most_columns, channels));
    for (int64_t index = begin; index < end; ++index) {
        const GroupBlock block(p, index);
        const int64_t origin = block.image * p.queries.pixels() * channels;
        const T* const x = static_cast<const T*>(p.x) + origin;
        T* const out = static_cast<T*>(p.out) + origin;
        const int64_t columns = block.for_groups(p, [&](const GroupPair& g, int64_t start) {
            const int64_t count = g.queries.tokens();
            list_pixels(p.queries, g.queries, list + start);
            load_columns(ListedPixels<const T>{x, channels, list + start, count},
                         Matrix{for_tokens + start, channels, padded(count), row});
        });
        const Matrix tokens{for_tokens, channels, columns, row};
        const Matrix qkv{for_qkv, 3 * channels, columns, row};
        const Matrix q = qkv.slice(0, channels), k = qkv.slice(channels, channels),
                     v = qkv.slice(2 * channels, channels);
        normalize_tokens(tokens, p.norm.of_image(block.image));
        weights.multiply(p.packed, tokens, room, qkv);
        scale_rows(q, p.q_bias, p.scale * kLog2E);
        for (int64_t head = 0; head < p.heads; ++head) {
            block.for_groups(p, [&](const GroupPair& g, int64_t start) {
                const int64_t count = g.queries.tokens();
                const auto of_head = [&](Matrix<float> rows) {
                    return Matrix{rows.row(head * depth) + start, depth, count, row};
                };
                attend(p, unit, g, head, of_head(q), of_head(k), of_head(v), of_head(q), scratch);
            });
        }
        weights.multiply(project_weight, q, room, tokens);
        const Epilogue epilogue = p.epilogue.of_image(block.image);
        block.for_groups(p, [&](const GroupPair& g, int64_t start) {
            store_columns(Matrix<const float>{for_tokens + start, channels, columns - start, row},
                          ListedPixels<T>{out, channels, list + start, g.queries.tokens()},
                          [&](Vec value, int64_t c, int64_t at, int64_t n) __attribute__((always_inline)) {
                              if (epilogue.bias != nullptr) {
                                  value = load(epilogue.gate + c, n) * (value + load(epilogue.bias + c, n));
                              }
                              return p.residual ? value + load(x + at, n) : value;
                          });
        });
    }
}

int64_t packed_size_any(const AttentionLayerParams& p) {
    return with_types(p.dtype, p.brgemm, [&](auto, const auto& unit) { return packed_size(p, unit); });
}

void pack_any(const AttentionLayerParams& p, int64_t begin, int64_t end) {
    with_types(p.dtype, p.brgemm, [&](auto type, const auto& unit) { pack<decltype(type)>(p, unit, begin, end); });
}

void forward_any(const AttentionLayerParams& p, int64_t begin, int64_t end, float* scratch) {
    with_types(p.dtype, p.brgemm,
               [&](auto type, const auto& unit) { forward<decltype(type)>(p, unit, begin, end, scratch); });
}

}  // namespace

constinit const AttentionLayerKernels AttentionLayerKernels::IPT_FAST_LEVEL = {cpu::packed_size_any, cpu::pack_any,
                                                                               cpu::forward_any};

}  // namespace ipt_fast::cpu
