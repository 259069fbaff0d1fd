// Products of fp32 by thirds (thirds.h, left_weights.h) of matrices whose memory ends where they do, by a loop that
// reads what tiles would: whole ones of rows. Values that nobody wrote are NaN. Prints the largest error of a product,
// in units of the sum of its absolute terms, and that of sums in fp32.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <memory>

#include "cpu/left_weights.h"

using namespace ipt_fast::cpu;

namespace {

float value_of(Pair pair, int64_t half) {
    const uint32_t bits = half == 0 ? pair.bits << 16 : pair.bits & 0xffff0000;
    float value;
    __builtin_memcpy(&value, &bits, sizeof(value));
    return value;
}

void product(Matrix<const Pair> a, Matrix<const Pair> b, Matrix<float> c, Accumulate accumulate) {
    constexpr int64_t kTile = 16, kProducts[][2] = {{2, 0}, {1, 0}, {1, 1}, {0, 1}, {0, 2}, {0, 0}};
    const int64_t rows = round_up(c.rows, kTile);
    if (c.rows > kThirdsRows || c.columns % kTile != 0 || c.columns > kThirdsColumns || a.columns % kGroupRow != 0) {
        abort();
    }
    for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < c.columns; ++j) {
            float sum = i < c.rows && accumulate == Accumulate::yes ? c.row(i)[j] : 0.0f;
            for (int64_t k = 0; k < a.columns; k += kGroupRow) {
                for (const auto [left, right] : kProducts) {
                    for (int64_t pair = 0; pair < kGroupPairs; ++pair) {
                        const Pair of_a = a.row(i)[k + left * kGroupPairs + pair];
                        const Pair of_b = b.row(k + right * kGroupPairs + pair)[j];
                        sum += value_of(of_a, 0) * value_of(of_b, 0) + value_of(of_a, 1) * value_of(of_b, 1);
                    }
                }
            }
            if (i < c.rows) {
                c.row(i)[j] = sum;
            }
        }
    }
}

// Memory of exactly so many values, all of which are NaN.
template <typename T>
std::unique_ptr<T[]> memory(int64_t count) {
    std::unique_ptr<T[]> all(new T[count]);
    memset(all.get(), 0xff, count * sizeof(T));
    return all;
}

std::unique_ptr<float[]> random_values(int64_t count) {
    auto all = memory<float>(count);
    for (int64_t i = 0; i < count; ++i) {
        all[i] = static_cast<float>(rand()) / static_cast<float>(RAND_MAX) - 0.5f;
    }
    return all;
}

double worst = 0.0, of_fp32 = 0.0;

// c = start + a w; element (k, j) of w is w[j * columns_apart + k * depth_apart].
void check(Matrix<const float> a, const float* w, int64_t columns_apart, int64_t depth_apart, Matrix<float> c,
           float start) {
    for (int64_t i = 0; i < c.rows; ++i) {
        for (int64_t j = 0; j < c.columns; ++j) {
            double sum = start, size = std::fabs(start);
            float plain = start;
            for (int64_t k = 0; k < a.columns; ++k) {
                const double term = static_cast<double>(a.row(i)[k]) * w[j * columns_apart + k * depth_apart];
                sum += term;
                plain += a.row(i)[k] * w[j * columns_apart + k * depth_apart];
                size += std::fabs(term);
            }
            const double error = std::fabs(c.row(i)[j] - sum) / size;
            worst = error <= worst ? worst : error;  // and what is NaN
            of_fp32 = std::fmax(of_fp32, std::fabs(plain - sum) / size);
        }
    }
}

void check_right_weight(int64_t rows, int64_t depth, int64_t columns, bool transposed, float start) {
    const VectorUnit unit{product};
    const auto a = random_values(rows * depth), w = random_values(columns * depth);
    const int64_t columns_apart = transposed ? 1 : depth, depth_apart = transposed ? columns : 1, row = padded(columns);
    const auto packed = memory<char>(unit.packed_size(columns, depth));
    const auto c = memory<float>(rows * row);
    const Matrix<float> target{c.get(), rows, columns, row};
    for (int64_t i = 0; start != 0.0f && i < rows * row; ++i) {
        c[i] = start;
    }
    unit.pack<float>({w.get(), columns, depth, columns_apart, depth_apart}, packed.get());
    const Matrix<const float> left{a.get(), rows, depth, depth};
    unit.multiply(left, packed.get(), target, start != 0.0f ? Accumulate::yes : Accumulate::no);
    check(left, w.get(), columns_apart, depth_apart, target, start);
}

void check_left_weight(int64_t rows, int64_t depth, int64_t columns) {
    const VectorUnit unit{product};
    const LeftWeights weights(unit, depth);
    const int64_t row = padded(columns);
    const auto w = random_values(rows * depth), b = random_values(depth * row);
    const auto packed = memory<char>(LeftWeights<VectorUnit>::readable(rows) * weights.row_bytes());
    for (int64_t i = 0; i < rows; ++i) {
        weights.pack(w.get() + i * depth, packed.get() + i * weights.row_bytes());
    }
    const auto room = memory<float>(packed_floats(DType::f32, product, columns, depth)), c = memory<float>(rows * row);
    const Matrix<float> target{c.get(), rows, columns, row};
    weights.multiply(packed.get(), Matrix<const float>{b.get(), depth, columns, row}, room.get(), target);
    check({w.get(), rows, depth, depth}, b.get(), 1, row, target, 0.0f);
}

}  // namespace

int main() {
    for (const int64_t depth : {1, 31, 32, 33, 63, 193, 385}) {
        for (const int64_t columns : {1, 31, 32, 33, 48, 70}) {
            for (const int64_t rows : {1, 15, 16, 17, 33}) {
                check_right_weight(rows, depth, columns, false, 0.0f);
                check_right_weight(rows, depth, columns, true, 0.75f);
                check_left_weight(rows, depth, columns);
            }
        }
    }
    printf("%g %g\n", worst, of_fp32);
}
