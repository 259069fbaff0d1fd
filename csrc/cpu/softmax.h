// Softmax over the columns of scores that are given times log2(e): powers of two take their place.
#pragma once

#include "matrix.h"
#include "vec.h"

namespace ipt_fast::cpu {
namespace {

// How exact the powers are: to two units in the last place of fp32, or to 2^-13, for products of 16-bit factors.
enum class Powers { exact, rough };

// Replaces `count` vectors of scores by 2^(score - largest), and adds them to `sums`. The power is 2^n 2^r with whole n
// and |r| <= 1/2. Differences below -64 are taken as -64: such a power counts nothing beside the largest one, but
// products with smaller ones could be subnormal numbers, which are slow. Each step is done for all vectors before the
// next one, because the steps of one vector wait for each other for longer than the processor looks ahead.
template <Powers kind, int count>
inline __attribute__((always_inline)) void powers_of(float* scores, const Vec (&largest)[count], Vec (&sums)[count]) {
    // Adding it rounds to an integer, which the low bits then hold, 127 higher, as the exponent of 2^n.
    const Vec shifter = broadcast(0x1.8p23f + 127);
    Vec n[count], r[count], y[count];
    // 2^r = 1 + r (c_1 + r (c_2 + ...)) with the least relative error, the last coefficient first.
    constexpr bool rough = kind == Powers::rough;
    constexpr float kExact[] = {0x1.5bba14p-10f, 0x1.3cea88p-7f, 0x1.c6b752p-5f, 0x1.ebf9bcp-3f, 0x1.62e42ap-1f, 1.0f};
    constexpr float kRough[] = {0x1.c2a218p-5f, 0x1.f00c4ep-3f, 0x1.62f5fap-1f, 1.0f};
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) {
        r[i] = max(broadcast(-64.0f), load(scores + i * kLanes) - largest[i]);  // NaN stays
        n[i] = r[i] + shifter;
        r[i] = r[i] - (n[i] - shifter);
        y[i] = broadcast(rough ? kRough[0] : kExact[0]);
    }
    constexpr int kDegree = rough ? 3 : 5;
#pragma GCC unroll 5
    for (int k = 1; k <= kDegree; ++k) {
#pragma GCC unroll 4
        for (int i = 0; i < count; ++i) {
            y[i] = fma(y[i], r[i], broadcast(rough ? kRough[k] : kExact[k]));
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) {
        y[i] = y[i] * (Vec)((IntVec)n[i] << 23);
        store(scores + i * kLanes, y[i]);
        sums[i] += y[i];
    }
}

// The same for the first `count` vectors of columns, and the inverses of the columns' sums.
template <Powers kind, int count>
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
            powers_of<kind, count>(scores.row(k), largest, parts);
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
template <Powers kind = Powers::exact>
inline void powers(Matrix<float> scores, float* inverses) {
    int64_t c = 0;
    for (; c + 4 * kLanes <= scores.columns; c += 4 * kLanes) {
        column_powers<kind, 4>(scores.from(0, c), inverses + c);
    }
    for (; c < scores.columns; c += kLanes) {
        column_powers<kind, 1>(scores.from(0, c), inverses + c);
    }
}

}  // namespace
}  // namespace ipt_fast::cpu
