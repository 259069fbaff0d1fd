// Softmax over the columns of scores that are given times log2(e): powers of two take their place.
#pragma once

#include "gemm.h"

namespace ipt_fast::cpu {
namespace {

// How exact the powers are: to two units in the last place of fp32, or to 2^-13, for products of 16-bit factors.
enum class Powers { exact, rough };

// 2^x in place of x <= 0, in `count` vectors: 2^n 2^r with whole n and |r| <= 1/2. What is below -64 is taken as -64:
// such a power counts nothing beside one of 1, but products with smaller ones could be subnormal numbers, which are
// slow. Each step is done for all vectors before the next one, because the steps of one vector wait for each other for
// longer than the processor looks ahead.
template <Powers kind, int count>
inline __attribute__((always_inline)) void powers_of(Vec (&x)[count]) {
    // Adding it rounds to an integer, which the low bits then hold, 127 higher, as the exponent of 2^n.
    const Vec shifter = broadcast(0x1.8p23f + 127);
    Vec n[count], y[count];
    // 2^r = 1 + r (c_1 + r (c_2 + ...)) with the least relative error, the last coefficient first.
    constexpr bool rough = kind == Powers::rough;
    constexpr float kExact[] = {0x1.5bba14p-10f, 0x1.3cea88p-7f, 0x1.c6b752p-5f, 0x1.ebf9bcp-3f, 0x1.62e42ap-1f, 1.0f};
    constexpr float kRough[] = {0x1.c2a218p-5f, 0x1.f00c4ep-3f, 0x1.62f5fap-1f, 1.0f};
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) {
        x[i] = max(broadcast(-64.0f), x[i]);  // NaN stays
        n[i] = x[i] + shifter;
        x[i] = x[i] - (n[i] - shifter);
        y[i] = broadcast(rough ? kRough[0] : kExact[0]);
    }
    constexpr int kDegree = rough ? 3 : 5;
#pragma GCC unroll 5
    for (int k = 1; k <= kDegree; ++k) {
#pragma GCC unroll 4
        for (int i = 0; i < count; ++i) {
            y[i] = fma(y[i], x[i], broadcast(rough ? kRough[k] : kExact[k]));
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) {
        x[i] = y[i] * (Vec)((IntVec)n[i] << 23);
    }
}

// Powers as pairs. Halves between two numbers go up, and NaN may get lost: sums of powers have it.
inline Bits power_pairs(Vec low, Vec high) {
    if constexpr (kDots) {
        return to_pairs(low, high);
    }
    return ((Bits)low + 0x8000) >> 16 | (((Bits)high + 0x8000) & 0xffff0000);
}

// Where no biases are added to scores; others have the same functions. of<count>(c) are those of `count` vectors of
// columns from c on, of which add_to(v, k, i) adds vector i of row k to v.
struct NoBiases {
    template <int count>
    NoBiases of(int64_t) const {
        return {};
    }
    Vec add_to(Vec v, int64_t, int) const { return v; }
};

// The softmax over columns of scores that come in blocks of rows, one below the other: what is known of each column.
struct ColumnSoftmax {
    static constexpr int64_t kMost = 64;  // columns

    int64_t columns;       // kLanes divides it
    float largest[kMost];  // score of the blocks so far
    float sums[kMost];     // of the powers so far
    float factors[kMost];  // what the powers of the blocks before the last one are still to be multiplied with

    explicit ColumnSoftmax(int64_t columns_) : columns(columns_) {
        for (int64_t c = 0; c < columns; c += kLanes) {
            store(largest + c, broadcast(-__builtin_inff()));
            store(sums + c, Vec{});
        }
    }

    // 2^(score - the column's largest so far) in place of the next block of scores, without their biases.
    template <typename Biases>
    void take_powers(Matrix<float> scores, const Biases& biases) {
        take<4>([&](auto count, int64_t c) __attribute__((always_inline)) {
            take_columns<Powers::exact, 1, decltype(count)::value>(
                scores.from(0, c), biases, c, [=](int64_t k, const auto& powers) __attribute__((always_inline)) {
#pragma GCC unroll 4
                    for (int i = 0; i < decltype(count)::value; ++i) {
                        store(scores.row(k) + c + i * kLanes, powers[i]);
                    }
                });
        });
    }

    // The same powers, rough, as pairs of rows, with zeros up to kChannelPad rows.
    template <typename Biases>
    Matrix<const Pair> take_power_pairs(Matrix<const float> scores, const Biases& biases, float* room) {
        Pair* const out = reinterpret_cast<Pair*>(room);
        const int64_t row = columns, pairs = padded(scores.rows) / 2, used = (scores.rows + 1) / 2;
        memset(out + used * row, 0, (pairs - used) * row * sizeof(Pair));
        take<2>([&](auto count, int64_t c) __attribute__((always_inline)) {
            constexpr int kCount = decltype(count)::value;
            take_columns<Powers::rough, 2, kCount>(
                scores.from(0, c), biases, c, [=](int64_t k, const auto& powers) __attribute__((always_inline)) {
#pragma GCC unroll 2
                    for (int i = 0; i < kCount; ++i) {
                        store(out + k / 2 * row + c + i * kLanes, power_pairs(powers[i], powers[kCount + i]));
                    }
                });
        });
        return {out, pairs, columns, row};
    }

    // The inverses of the sums in their place; NaN where all scores are -infinity.
    void invert() {
        for (int64_t c = 0; c < columns; c += kLanes) {
            const Vec most = load(largest + c);
            store(sums + c, (1.0f + (most - most)) / load(sums + c));
        }
    }

  private:
    // body(Constant<n>, c) for n vectors of columns from c on.
    template <int most, typename Body>
    inline __attribute__((always_inline)) void take(const Body& body) const {
        int64_t c = 0;
        for (; c + most * kLanes <= columns; c += most * kLanes) {
            body(Constant<most>{}, c);
        }
        for (; c < columns; c += kLanes) {
            body(Constant<1>{}, c);
        }
    }

    // put(k, powers) for rows k to k + rows - 1 of `count` vectors of columns from c on; zeros behind the last row.
    template <Powers kind, int rows, int count, typename Biases, typename Put>
    inline __attribute__((always_inline)) void take_columns(Matrix<const float> scores, const Biases& biases, int64_t c,
                                                            const Put& put) {
        const auto bias = biases.template of<count>(c);
        const auto score = [=](int64_t k, int i) __attribute__((always_inline)) {
            return bias.add_to(load(scores.row(k) + i * kLanes), k, i);
        };
        Vec most[count], total[count], before[count];
#pragma GCC unroll 4
        for (int i = 0; i < count; ++i) {
            before[i] = most[i] = load(largest + c + i * kLanes);
        }
        for (int64_t k = 0; k < scores.rows; ++k) {
#pragma GCC unroll 4
            for (int i = 0; i < count; ++i) {
                most[i] = max(most[i], score(k, i));
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < count; ++i) {
            store(largest + c + i * kLanes, most[i]);
            most[i] = max(broadcast(-__FLT_MAX__), most[i]);  // a block of -infinity may be followed by others
            before[i] = before[i] - most[i];
        }
        powers_of<Powers::exact>(before);
#pragma GCC unroll 4
        for (int i = 0; i < count; ++i) {
            store(factors + c + i * kLanes, before[i]);
            total[i] = load(sums + c + i * kLanes) * before[i];
        }
        const auto take_rows = [&](auto there, int64_t k, Vec(&parts)[count]) __attribute__((always_inline)) {
            constexpr int kThere = decltype(there)::value;
            Vec x[rows * count];
#pragma GCC unroll 4
            for (int i = 0; i < kThere * count; ++i) {
                x[i] = score(k + i / count, i % count) - most[i % count];
            }
            powers_of<kind>(reinterpret_cast<Vec(&)[kThere * count]>(x));
#pragma GCC unroll 4
            for (int i = 0; i < kThere * count; ++i) {
                parts[i % count] += x[i];
            }
#pragma GCC unroll 4
            for (int i = kThere * count; i < rows * count; ++i) {
                x[i] = Vec{};
            }
            put(k, x);
        };
        constexpr int64_t kBlock = 8;  // rows added up by themselves: a few short sums round less than one long one
        for (int64_t first = 0; first < scores.rows; first += kBlock) {
            const int64_t last = first + kBlock < scores.rows ? first + kBlock : scores.rows;
            Vec parts[count]{};
            int64_t k = first;
            for (; k + rows <= last; k += rows) {
                take_rows(Constant<rows>{}, k, parts);
            }
            if (k < last) {
                take_rows(Constant<1>{}, k, parts);
            }
#pragma GCC unroll 4
            for (int i = 0; i < count; ++i) {
                total[i] += parts[i];
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < count; ++i) {
            store(sums + c + i * kLanes, total[i]);
        }
    }
};

}  // namespace
}  // namespace ipt_fast::cpu
