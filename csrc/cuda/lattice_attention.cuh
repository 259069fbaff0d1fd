// Attention inside dilated lattices, by a warp.
//
// Tokens of a group are numbered as on a lattice of Side x Side points, 8 or 16, of which the group has the first rows
// and columns: then a block of 16 x 16 scores lies in one lattice row of queries and one of keys (Side 16) or in two
// and two, and the biases that it needs are three pairs a lane, at addresses that the compiler knows but for their
// base. For values of 16 bits scores are times log2(e), by the scale of the queries and in the biases; for float that
// would round them once more.
#pragma once

#include "grid_attention_layer.cuh"
#include "warp_tiles.cuh"

namespace ipt_fast::cuda {

// ---- points --------------------------------------------------------------------------------------------------------

// A token's lattice row and column; signed division would take three more instructions.
template <int Side>
IPT_FAST_DEVICE int row_of(int token) {
    return (int)((unsigned)token / Side);
}
template <int Side>
IPT_FAST_DEVICE int column_of(int token) {
    return (int)((unsigned)token % Side);
}

// A group, and where its points are, counted in pixels through the batch.
struct Points {
    int64_t first, row_step;
    int column_step, rows, columns;

    template <int Side>
    IPT_FAST_DEVICE bool has(int token) const {
        return row_of<Side>(token) < rows && column_of<Side>(token) < columns;
    }
    template <int Side>
    IPT_FAST_DEVICE int64_t pixel(int token) const {
        return first + row_of<Side>(token) * row_step + column_of<Side>(token) * column_step;
    }
};

// The groups of all images, image by image; from `count` on they have no points.
IPT_FAST_DEVICE Points points_of(const Lattices& l, int group, int count) {
    const int groups = l.cubby_rows * l.cubby_columns, image = group / groups, in_image = group - image * groups;
    const int y = in_image / l.cubby_columns, x = in_image - y * l.cubby_columns;
    // Only the last lattice row and column can be beyond the border.
    const int rows = l.rows - (y + (l.rows - 1) * l.cubby_rows >= l.height ? 1 : 0);
    const int columns = l.columns - (x + (l.columns - 1) * l.cubby_columns >= l.width ? 1 : 0);
    return {image * l.pixels + (int64_t)y * l.width + x, (int64_t)l.cubby_rows * l.width, l.cubby_columns,
            group < count ? rows : 0, columns};
}

// ---- biases --------------------------------------------------------------------------------------------------------

constexpr float kLog2E = 1.4426950408889634f;
// The units of scores of values T, and what makes them powers of two.
template <class T>
constexpr float kScoreUnit = sizeof(T) == 2 ? kLog2E : 1.0f;
template <class T>
constexpr float kScoreToPower = kLog2E / kScoreUnit<T>;

// The biases of two neighbouring keys in a lattice row, of which the second is one column nearer to the query.
struct alignas(8) BiasPair {
    float first, second;
};

template <int Side>
constexpr int kBiasRow = 2 * Side - 1;
template <int Side>
constexpr int kBiasCount = kBiasRow<Side> * kBiasRow<Side>;

// Those of a head, by row and column of the query less those of the first key, from 1 - Side on; by the whole block.
template <class T, int Side>
IPT_FAST_DEVICE void load_biases(BiasPair* to, const GridAttentionLayerArguments& p, int heads, int head) {
    auto bias = [&](int row, int column) {
        const int64_t grid = p.grid, at = ((row + grid - 1) * (2 * grid - 1) + column + grid - 1) * heads + head;
        const bool there = p.table != nullptr && row > -grid && row < grid && column > -grid && column < grid;
        return there ? small_value<T>(p.table, at, p.narrow) * kScoreUnit<T> : 0.0f;
    };
    for (int i = thread_index(); i < kBiasCount<Side>; i += block_threads()) {
        const int row = i / kBiasRow<Side> + 1 - Side, column = i % kBiasRow<Side> + 1 - Side;
        to[i] = {bias(row, column), bias(row, column - 1)};
    }
}

// This lane's first pair for the block of scores at these tokens, multiples of 16.
template <int Side>
IPT_FAST_DEVICE const BiasPair* biases_of(const BiasPair* biases, int query, int key) {
    const int lane = lane_index(), row = row_of<Side>(query) - row_of<Side>(key);
    return biases + (row + Side - 1) * kBiasRow<Side> + lane / 4 - lane % 4 * 2 + Side - 1;
}

// ---- attention -----------------------------------------------------------------------------------------------------

// Powers of two are taken of scores less a shift, a row's largest score so far or up to this much below it: where the
// largest grows by less, nothing has to be scaled again.
constexpr float kShiftSlack = 8;

// Of a warp: 16 * Down queries of a head and what they have attended to. Keys come `Chunk` at a time, from rows of
// padded_row<T>(Width) values in shared memory.
template <class T, int Width, int Side, int Down, int Chunk>
struct LatticeAttention {
    static constexpr int kDepth = sizeof(T) == 2 ? 16 : 8, kSteps = Width / kDepth;
    static constexpr int kStride = padded_row<T>(Width);

    BlockA operands[Down][kSteps];  // the queries; at the end what they have attended to
    WarpSums<16, Width> out[Down];
    float shift[Down][2], total[Down][2];  // of rows i / 4 and i / 4 + 8; totals of this lane's columns only

    IPT_FAST_DEVICE void begin(WarpSums<16, Width> (&q)[Down]) {
        const float scale = kScoreUnit<T> / sqrtf((float)Width);
#pragma unroll
        for (int i = 0; i < Down; ++i) {
            out[i].clear();
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                shift[i][half] = -INFINITY;
                total[i][half] = 0;
            }
            q[i].for_pairs([&](int, int, float* pair) {
                pair[0] *= scale;
                pair[1] *= scale;
            });
#pragma unroll
            for (int step = 0; step < kSteps; ++step) {
                operands[i][step] = as_a<T>(q[i], step * kDepth);
            }
        }
    }

    // `biases` are those of the first query and key (biases_of). Keys that the group lacks count nothing.
    IPT_FAST_DEVICE void attend(const T* keys, const T* values, const BiasPair* biases, int first_key,
                                const Points& points, bool tf32) {
        WarpSums<16, Chunk> scores[Down];
        if constexpr (sizeof(T) == 2) {
            add_biases(scores, biases);
        } else {
#pragma unroll
            for (int i = 0; i < Down; ++i) {
                scores[i].clear();
            }
        }
#pragma unroll
        for (int j = 0; j < Chunk / 16; ++j) {
#pragma unroll
            for (int step = 0; step < kSteps; ++step) {
                const BlockB block = load_b(keys + j * 16 * kStride + step * kDepth, kStride);
#pragma unroll
                for (int i = 0; i < Down; ++i) {
                    multiply_add<T>(scores[i].values[0][j], operands[i][step], block, tf32);
                }
            }
        }
        if constexpr (sizeof(T) == 4) {
            add_biases(scores, biases);
        }
        if (points.columns < Side || first_key + Chunk > points.rows * Side) {
            mask(scores, first_key, points);
        }
        raise_shifts(scores);
#pragma unroll
        for (int i = 0; i < Down; ++i) {
            exponentiate(i, scores[i]);
        }
#pragma unroll
        for (int k = 0; k < Chunk; k += kDepth) {
            BlockA weights[Down];
#pragma unroll
            for (int i = 0; i < Down; ++i) {
                weights[i] = as_a<T>(scores[i], k);
            }
#pragma unroll
            for (int j = 0; j < Width / 16; ++j) {
                const BlockB block = load_b_transposed(values + k * kStride + j * 16, kStride);
#pragma unroll
                for (int i = 0; i < Down; ++i) {
                    multiply_add<T>(out[i].values[0][j], weights[i], block, tf32);
                }
            }
        }
    }

    // NaN in rows whose keys all have a bias of -inf, as the formula has it.
    IPT_FAST_DEVICE void finish() {
#pragma unroll
        for (int i = 0; i < Down; ++i) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                scale_row(i, half, reciprocal(sum_of_row(total[i][half])));
            }
#pragma unroll
            for (int step = 0; step < kSteps; ++step) {
                operands[i][step] = as_a<T>(out[i], step * kDepth);
            }
        }
    }

  private:
    // Of 16 bits the biases are the first values of the sums; of float each of the sums' steps would round at their
    // size.
    IPT_FAST_DEVICE static void add_bias(float& score, float bias) { score = sizeof(T) == 2 ? bias : score + bias; }
    IPT_FAST_DEVICE static void add_biases(WarpSums<16, Chunk> (&scores)[Down], const BiasPair* biases) {
        // Rows i / 4 + 8, and columns from 8 on, are as many lattice columns away, or in the next lattice row.
        constexpr int half_step = Side == 16 ? 8 : kBiasRow<Side>, block_step = 16 / Side * kBiasRow<Side>;
#pragma unroll
        for (int i = 0; i < Down; ++i) {
#pragma unroll
            for (int j = 0; j < Chunk / 16; ++j) {
                const BiasPair* at = biases + (i - j) * block_step;
                const BiasPair near = at[0], left = at[-half_step], below = at[half_step];
                auto& block = scores[i].values[0][j];
                add_bias(block[0][0], near.first);
                add_bias(block[0][1], near.second);
                add_bias(block[1][2], near.first);
                add_bias(block[1][3], near.second);
                add_bias(block[1][0], left.first);
                add_bias(block[1][1], left.second);
                add_bias(block[0][2], below.first);
                add_bias(block[0][3], below.second);
            }
        }
    }

    // first_key is a multiple of 16.
    IPT_FAST_DEVICE static void mask(WarpSums<16, Chunk> (&scores)[Down], int first_key, const Points& points) {
        const int left = lane_index() % 4 * 2, rows = points.rows - row_of<Side>(first_key);
#pragma unroll
        for (int n = 0; n < Chunk / 4; ++n) {
            const int j = n / 4, eight = n / 2 % 2, v = n % 2;
            const int row = j * (16 / Side) + (Side == 8 ? eight : 0), column = left + v + (Side == 16 ? eight * 8 : 0);
            const bool there = row < rows && column < points.columns;
#pragma unroll
            for (int i = 0; i < Down * 2; ++i) {
                float& score = scores[i / 2].values[0][j][eight][i % 2 * 2 + v];
                score = there ? score : -INFINITY;
            }
        }
    }

    IPT_FAST_DEVICE void scale_row(int i, int half, float factor) {
#pragma unroll
        for (int j = 0; j < Width / 16; ++j) {
#pragma unroll
            for (int v = 0; v < 4; ++v) {
                out[i].values[0][j][v / 2][half * 2 + v % 2] *= factor;
            }
        }
    }

    // Where a row's largest score grows by more than the slack.
    IPT_FAST_DEVICE void raise_shifts(const WarpSums<16, Chunk> (&scores)[Down]) {
        float top[Down][2];
        bool grows = false;
#pragma unroll
        for (int i = 0; i < Down; ++i) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                top[i][half] = -INFINITY;
#pragma unroll
                for (int n = 0; n < Chunk / 4; ++n) {
                    top[i][half] = fmaxf(top[i][half], scores[i].values[0][n / 4][n / 2 % 2][half * 2 + n % 2]);
                }
                grows = grows || top[i][half] > shift[i][half] + kShiftSlack;
            }
        }
        if (any_lane(grows)) {
#pragma unroll
            for (int i = 0; i < Down; ++i) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const float largest = fmaxf(max_of_row(top[i][half]), shift[i][half]);
                    // Of nothing, where all keys so far have a bias of -inf.
                    const float shrink =
                        largest == -INFINITY ? 1.0f : power_of_two((shift[i][half] - largest) * kScoreToPower<T>);
                    scale_row(i, half, shrink);
                    total[i][half] *= shrink;
                    shift[i][half] = largest;
                }
            }
        }
    }

    IPT_FAST_DEVICE void exponentiate(int i, WarpSums<16, Chunk>& scores) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float finite = shift[i][half] == -INFINITY ? 0.0f : shift[i][half];
#pragma unroll
            for (int n = 0; n < Chunk / 4; ++n) {
                float& score = scores.values[0][n / 4][n / 2 % 2][half * 2 + n % 2];
                score = power_of_two((score - finite) * kScoreToPower<T>);
                total[i][half] += score;
            }
        }
    }
};

}  // namespace ipt_fast::cuda
