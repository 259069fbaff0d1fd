// Attention of one head over the pixels of one group, in scratch memory.
//
// Tokens lie side by side there, a row for each channel: vectors run along the tokens, so that heads of any width are
// computed without padding, a norm or a softmax needs no sum over the lanes of a vector, and every product takes its
// operands as they lie. A row ends in whole vectors; what is behind its tokens is never mixed with them.
#pragma once

#include "group_attention_kernel.h"
#include "rows.h"
#include "softmax.h"
#include "units.h"

namespace ipt_fast::cpu {
namespace {

// Hands out pieces of a thread's memory, one after the other. All sizes are multiples of kChannelPad.
struct ScratchStack {
    float* next;

    float* take(int64_t size) {
        float* piece = next;
        next += size;
        return piece;
    }
};

// The tokens of a group, row by row.
struct Group {
    TokenSpan rows, columns;

    Group(const TokenGroups& groups, int64_t index) {
        const int64_t i = index / groups.horizontal.groups, j = index % groups.horizontal.groups;
        const auto span = groups.whole ? whole_span_of : span_of;
        rows = span(groups.vertical, i);
        columns = span(groups.horizontal, j);
    }

    int64_t tokens() const { return rows.count * columns.count; }
};

// The pixels of a group's tokens; kNoPixel for those beyond the border.
constexpr int64_t kNoPixel = -1;

inline void list_pixels(const TokenGroups& groups, const Group& g, int64_t* list) {
    const int64_t height = groups.vertical.size, width = groups.horizontal.size;
    for (int64_t a = 0; a < g.rows.count; ++a) {
        const int64_t y = g.rows.first + a * g.rows.step;
        for (int64_t b = 0; b < g.columns.count; ++b) {
            const int64_t x = g.columns.first + b * g.columns.step;
            const bool inside = y >= 0 && y < height && x >= 0 && x < width;
            *list++ = !inside ? kNoPixel : groups.transposed ? x * height + y : y * width + x;
        }
    }
}

// The pixels of a list, in a map of T.
template <typename T>
struct ListedPixels {
    T* map;
    int64_t step;  // values between two pixels of the map
    const int64_t* list;
    int64_t count;

    // body(yes) with yes.value: whether the kLanes pixels from i on are all there, and none is kNoPixel.
    template <typename Body>
    IPT_FAST_INLINE void with_all(int64_t i, const Body& body) const {
        bool all = i + kLanes <= count;
        for (int64_t j = i; j < i + kLanes && all; ++j) {
            all = list[j] != kNoPixel;
        }
        return all ? body(Constant<1>{}) : body(Constant<0>{});
    }
};

// Pixels become columns; zeros behind them.
template <typename T>
inline void load_columns(const ListedPixels<const T>& pixels, Matrix<float> out) {
    for (int64_t i = 0; i < out.columns; i += kLanes) {
        const int64_t rest = pixels.count - i, step = pixels.step;
        const int64_t* const list = pixels.list + i;
        pixels.with_all(i, [&](auto all) __attribute__((always_inline)) {
            for_covering_vectors(out.rows, [&](int64_t c, int64_t n) __attribute__((always_inline)) {
                const T* const map = pixels.map + c;
                Vec tile[kLanes];
#pragma GCC unroll 16
                for (int64_t j = 0; j < kLanes; ++j) {
                    const bool there = decltype(all)::value || (j < rest && list[j] != kNoPixel);
                    tile[j] = there ? load(map + list[j] * step, n) : Vec{};
                }
                transpose(tile);
#pragma GCC unroll 16
                for (int64_t j = 0; j < kLanes; ++j) {
                    if (j < n) {
                        store(out.row(c + j) + i, tile[j]);
                    }
                }
            });
        });
    }
}

// Columns become pixels; finish(value, c, at, n) is what is stored for `n` channels from c on, at this place of a map.
template <typename T, typename Finish>
inline void store_columns(Matrix<const float> in, const ListedPixels<T>& pixels, const Finish& finish) {
    for (int64_t i = 0; i < pixels.count; i += kLanes) {
        const int64_t rest = pixels.count - i, step = pixels.step;
        const int64_t* const list = pixels.list + i;
        pixels.with_all(i, [&](auto all) __attribute__((always_inline)) {
            for_covering_vectors(in.rows, [&](int64_t c, int64_t n) __attribute__((always_inline)) {
                Vec tile[kLanes];
#pragma GCC unroll 16
                for (int64_t j = 0; j < kLanes; ++j) {
                    tile[j] = j < n ? load(in.row(c + j) + i) : Vec{};
                }
                transpose(tile);
#pragma GCC unroll 16
                for (int64_t j = 0; j < kLanes; ++j) {
                    if (decltype(all)::value || j < rest) {
                        const int64_t at = list[j] * step + c;
                        store(pixels.map + at, finish(tile[j], c, at, n), n);
                    }
                }
            });
        });
    }
}

// Every row is (row + its bias) * factor; bias == nullptr: zeros.
inline void scale_rows(Matrix<float> rows, const float* bias, float factor) {
    for (int64_t i = 0; i < rows.rows; ++i) {
        const float of_row = bias == nullptr ? 0.0f : bias[i];
        for (int64_t c = 0; c < rows.columns; c += kLanes) {
            float* const value = rows.row(i) + c;
            store(value, (load(value) + of_row) * factor);
        }
    }
}

// out = each column times its factor.
inline void scale_columns(Matrix<const float> in, const float* factors, Matrix<float> out) {
    for (int64_t i = 0; i < in.rows; ++i) {
        for (int64_t c = 0; c < in.columns; c += kLanes) {
            store(out.row(i) + c, load(in.row(i) + c) * load(factors + c));
        }
    }
}

// body(a, b, start, count) for the pieces of a group's rows that `count` tokens from `first` on are made of.
template <typename Body>
inline void for_pieces(int64_t columns, int64_t first, int64_t count, const Body& body) {
    int64_t a = first / columns, b = first % columns;
    for (int64_t start = 0; start < count; b = 0, ++a) {
        const int64_t rest = count - start, piece = columns - b < rest ? columns - b : rest;
        body(a, b, start, piece);
        start += piece;
    }
}

// A query's and a key's group, and where the biases of the first query and key are.
struct GroupPair {
    Group queries, keys;
    int64_t index;       // counted through the batch
    int64_t first_bias;  // of a head's

    GroupPair(const GroupAttention& p, int64_t index_)
        : queries(p.queries, index_ % p.queries.count()), keys(p.keys, index_ % p.keys.count()), index(index_) {
        const ScoreBiases& bias = p.bias;
        first_bias = bias.first + queries.rows.before * bias.query_row + queries.columns.before +
                     keys.rows.before * bias.key_row + keys.columns.before * bias.key_column;
    }

    int64_t image(const GroupAttention& p) const { return index / p.queries.count(); }
};

// The biases of `piece` queries, next to each other in a row, for as many keys from `first_key` on as there are scores.
// They are copied in runs, which may go too far, up to the last column of the scores.
template <int64_t run>
inline void copy_biases(const ScoreBiases& biases, const Group& keys, int64_t first_key, const float* bias,
                        int64_t piece, Matrix<float> scores) {
    const int64_t room = scores.columns, row = scores.stride;
    for (int64_t c = 0; c < piece; c += run) {
        const int64_t size = (room - c < run ? room - c : run) * static_cast<int64_t>(sizeof(float));
        for_pieces(keys.columns.count, first_key, scores.rows, [&](int64_t a, int64_t b, int64_t start, int64_t n) {
            float* target = scores.row(start) + c;
            const float* source = bias + c + a * biases.key_row + b * biases.key_column;
            for (int64_t k = 0; k < n; ++k, target += row, source += biases.key_column) {
                if (size == run * sizeof(float)) {
                    memcpy(target, source, run * sizeof(float));
                } else {
                    memcpy(target, source, size);
                }
            }
        });
    }
}

// The biases of `count` queries (columns) from `first` on and of keys (rows) from `first_key` on, what their scores are
// added to; zeros in the padding. Returns whether there are any.
inline Accumulate start_scores(const GroupAttention& p, const GroupPair& g, int64_t head, int64_t first, int64_t count,
                               int64_t first_key, Matrix<float> scores) {
    const ScoreBiases& biases = p.bias;
    if (biases.values == nullptr) {
        return Accumulate::no;
    }
    const float* const bias = biases.values + head * biases.size + g.first_bias;
    // Rows of queries whose biases follow each other are one piece.
    const int64_t columns = g.queries.columns.count;
    const bool dense = columns == biases.query_row;
    for_pieces(dense ? g.queries.tokens() : columns, first, count, [&](int64_t a, int64_t b, int64_t start, int64_t n) {
        const float* const source = bias + a * biases.query_row + b;
        // What goes too far is written later.
        if (n < 16) {
            copy_biases<8>(biases, g.keys, first_key, source, n, scores.from(0, start));
        } else {
            copy_biases<16>(biases, g.keys, first_key, source, n, scores.from(0, start));
        }
    });
    for (int64_t k = 0; k < scores.rows && count < scores.columns; ++k) {
        memset(scores.row(k) + count, 0, (scores.columns - count) * sizeof(float));
    }
    return Accumulate::yes;
}

static_assert(kChunk <= ColumnSoftmax::kMost);

// The biases of a chunk of queries and a block of keys: vector i of the queries has those of key k at queries[i] +
// keys[k].
struct BlockBiases {
    const float* queries[kChunk / kLanes];
    int64_t keys[kKeyBlock];

    template <int count>
    struct Some {
        const float* queries[count];
        const int64_t* keys;

        inline __attribute__((always_inline)) Vec add_to(Vec v, int64_t k, int i) const {
            return v + load(queries[i] + keys[k]);
        }
    };

    template <int count>
    Some<count> of(int64_t c) const {
        Some<count> some;
        memcpy(some.queries, queries + c / kLanes, sizeof(some.queries));
        some.keys = keys;
        return some;
    }
};

// Those of `count` queries from `first` on and of keys from `first_key` on: in place, if all queries of a vector lie in
// one row of biases, else copied to `room`.
inline BlockBiases find_biases(const GroupAttention& p, const GroupPair& g, int64_t head, int64_t first, int64_t count,
                               int64_t first_key, Matrix<float> room) {
    const ScoreBiases& biases = p.bias;
    const int64_t columns = g.queries.columns.count;
    BlockBiases found;
    if (columns != biases.query_row && columns % kLanes != 0) {
        start_scores(p, g, head, first, count, first_key, room);
        for (int64_t c = 0; c < room.columns; c += kLanes) {
            found.queries[c / kLanes] = room.data + c;
        }
        for (int64_t k = 0; k < room.rows; ++k) {
            found.keys[k] = k * room.stride;
        }
        return found;
    }
    const float* const bias = biases.values + head * biases.size + g.first_bias;
    for (int64_t c = 0; c < room.columns; c += kLanes) {
        const int64_t query = first + (c < count ? c : 0);  // vectors of padding have any
        found.queries[c / kLanes] = bias + query / columns * biases.query_row + query % columns;
    }
    for_pieces(g.keys.columns.count, first_key, room.rows, [&](int64_t a, int64_t b, int64_t start, int64_t n) {
        for (int64_t k = 0; k < n; ++k) {
            found.keys[start + k] = a * biases.key_row + (b + k) * biases.key_column;
        }
    });
    return found;
}

// `count` keys of all, as a product's left operand.
inline Matrix<const Pair> some_keys(Matrix<const Pair> keys, int64_t first, int64_t count) {
    return keys.slice(first, count);
}
template <typename E>
inline Transposed<E> some_keys(Transposed<E> keys, int64_t first, int64_t count) {
    return {{keys.of.data + first, keys.of.rows, count, keys.of.stride}};
}

// The powers of a block's scores, as a product's right operand.
template <typename Unit, typename Biases>
inline auto right_powers(const Unit&, ColumnSoftmax& softmax, Matrix<float> scores, const Biases& biases, float* room) {
    if constexpr (sizeof(typename Unit::Value) < sizeof(float)) {
        return softmax.take_power_pairs(scores, biases, room);
    } else {
        softmax.take_powers(scores, biases);
        return Matrix<const float>(scores);
    }
}

// out (depth, queries) = v softmax(k q + biases): q (depth, queries), times the scale and kLog2E; k and v (depth,
// keys). `out` may be q. The scores of a chunk of queries and a block of keys stay in the first cache.
template <typename Unit>
inline void attend(const GroupAttention& p, const Unit& unit, const GroupPair& g, int64_t head, Matrix<const float> q,
                   Matrix<const float> k, Matrix<const float> v, Matrix<float> out, ScratchStack scratch) {
    const int64_t queries = q.columns, keys = k.columns;
    float *const for_scores = scratch.take(kChunk * kKeyBlock), *const powers_room = scratch.take(kChunk * kKeyBlock);
    float* const biases_room = scratch.take(kChunk * kKeyBlock);
    float *const queries_room = scratch.take(chunk_size(p)), *const for_sums = scratch.take(chunk_size(p));
    const auto left_keys = unit.left_transposed(k, scratch.take(keys_size(p)));
    const auto values = unit.rows(v, scratch.take(keys_size(p)));
    for (int64_t first = 0; first < queries; first += kChunk) {
        const int64_t count = queries - first < kChunk ? queries - first : kChunk, row = padded(count);
        const auto chunk = unit.right(Matrix{q.row(0) + first, p.depth, row, q.stride}, queries_room);
        const Matrix sums{for_sums, p.depth, row, row};
        ColumnSoftmax softmax(row);
        for (int64_t key = 0; key < keys; key += kKeyBlock) {
            const int64_t block = keys - key < kKeyBlock ? keys - key : kKeyBlock;
            const Matrix scores{for_scores, block, row, row};
            unit.product(some_keys(left_keys, key, block), chunk, scores, Accumulate::no);
            const auto take = [&](const auto& biases) {
                return right_powers(unit, softmax, scores, biases, powers_room);
            };
            const auto powers =
                p.bias.values == nullptr
                    ? take(NoBiases{})
                    : take(find_biases(p, g, head, first, count, key, Matrix{biases_room, block, row, row}));
            if (key > 0) {
                scale_columns(sums, softmax.factors, sums);
            }
            const Matrix some_values{values.row(0) + key, p.depth, block, values.stride};
            unit.product(unit.left(some_values), powers, sums, key > 0 ? Accumulate::yes : Accumulate::no);
        }
        softmax.invert();
        scale_columns(sums, softmax.sums, Matrix{out.row(0) + first, p.depth, row, out.stride});
    }
}

}  // namespace
}  // namespace ipt_fast::cpu
