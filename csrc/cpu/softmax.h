// Softmax over the columns of scores that are given times log2(e): powers of two take their place.
#pragma once

#include "matrix.h"
#include "vec.h"

namespace ipt_fast::cpu {
namespace {

// Replaces `count` vectors of scores by 2^(score - largest), within two units in the last place, and adds them to
// `sums`. The power is 2^n 2^r with whole n and |r| <= 1/2. Differences below -64 are taken as -64: such a power counts
// nothing beside the largest one, but products with smaller ones could be subnormal numbers, which are slow. Each step
// is done for all vectors before the next one, because the steps of one vector wait for each other for longer than the
// processor looks ahead.
template <int count>
inline __attribute__((always_inline)) void powers_of(float* scores, const Vec (&largest)[count], Vec (&sums)[count]) {
    const Vec shifter = broadcast(0x1.8p23f);  // adding it rounds to an integer, which the low bits then hold
    Vec n[count], r[count], y[count];
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) {
        r[i] = load(scores + i * kLanes) - largest[i];
        r[i] = r[i] < -64.0f ? broadcast(-64.0f) : r[i];  // NaN stays
        n[i] = r[i] + shifter;
        r[i] = r[i] - (n[i] - shifter);
        y[i] = fma(broadcast(0x1.41fbbcp-13f), r[i], broadcast(0x1.5f3e54p-10f));
    }
    constexpr float kCoefficients[] = {0x1.3b2d4cp-7f, 0x1.c6aee8p-5f, 0x1.ebfbdcp-3f, 0x1.62e43p-1f, 1.0f};
#pragma GCC unroll 5
    for (const float coefficient : kCoefficients) {
#pragma GCC unroll 4
        for (int i = 0; i < count; ++i) {
            y[i] = fma(y[i], r[i], broadcast(coefficient));
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) {
        const Vec scaled = (Vec)((IntVec)y[i] + ((IntVec)n[i] << 23));
        y[i] = r[i] == r[i] ? scaled : r[i];
        store(scores + i * kLanes, y[i]);
        sums[i] += y[i];
    }
}

// The same for the first `count` vectors of columns, and the inverses of the columns' sums.
template <int count>
inline void column_powers(Matrix<float> scores, float* inverses) {
    const int64_t rows = scores.rows;
    Vec largest[count], sums[count]{};
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) {
        largest[i] = load(scores.data + i * kLanes);
    }
    for (int64_t k = 1; k < rows; ++k) {
#pragma GCC unroll 4
        for (int i = 0; i < count; ++i) {
            largest[i] = max(largest[i], load(scores.row(k) + i * kLanes));
        }
    }
    constexpr int64_t kBlock = 8;  // rows added up by themselves: a few short sums round less than one long one
    for (int64_t first = 0; first < rows; first += kBlock) {
        const int64_t last = first + kBlock < rows ? first + kBlock : rows;
        Vec parts[count]{};
        for (int64_t k = first; k < last; ++k) {
            powers_of<count>(scores.row(k), largest, parts);
        }
#pragma GCC unroll 4
        for (int i = 0; i < count; ++i) {
            sums[i] += parts[i];
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) {
        store(inverses + i * kLanes, 1.0f / sums[i]);
    }
}

// 2^(score - the column's largest) in place of the scores, and the inverse of each column's sum. kLanes divides the
// number of columns.
inline void powers(Matrix<float> scores, float* inverses) {
    int64_t c = 0;
    for (; c + 4 * kLanes <= scores.columns; c += 4 * kLanes) {
        column_powers<4>(scores.from(0, c), inverses + c);
    }
    for (; c < scores.columns; c += kLanes) {
        column_powers<1>(scores.from(0, c), inverses + c);
    }
}

}  // namespace
}  // namespace ipt_fast::cpu
