// Every function of vec.h against scalar C++, the conversions for all 65536 values, and the products of gemm.h;
// compiled for one level. Prints each failure, and fails if there is one.
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <vector>

#include "cpu/gelu.h"
#include "cpu/gemm.h"
#include "cpu/softmax.h"
#include "cpu/units.h"
#include "cpu/vec.h"

using namespace ipt_fast::cpu;

namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN(), kInfinity = std::numeric_limits<float>::infinity();

int failures = 0;

void expect(bool right, const char* what, double where = 0) {
    if (!right && ++failures <= 20) {
        printf("%s (%.9g)\n", what, where);
    }
}

std::mt19937 generator(0);

float random_value(float low = -1, float high = 1) {
    return std::uniform_real_distribution<float>(low, high)(generator);
}

Vec random_vec(float low = -1, float high = 1) {
    Vec v;
    for (int i = 0; i < kLanes; ++i) {
        v[i] = random_value(low, high);
    }
    return v;
}

std::vector<float> random_values(int64_t count) {
    std::vector<float> values(count);
    for (float& value : values) {
        value = random_value();
    }
    return values;
}

// Bit for bit, but all NaN are one.
bool same(float a, float b) { return (a != a && b != b) || memcmp(&a, &b, sizeof(a)) == 0; }

void check_arithmetic() {
    for (int repeat = 0; repeat < 1000; ++repeat) {
        const Vec a = random_vec(), b = random_vec(), c = random_vec(), sum = fma(a, b, c);
        for (int i = 0; i < kLanes; ++i) {
            const float once = __builtin_fmaf(a[i], b[i], c[i]), twice = a[i] * b[i] + c[i];
            expect(IPT_FAST_FUSED ? same(sum[i], once) : same(sum[i], twice), "fma", a[i]);
            expect(same(sqrt(a * a)[i], std::sqrt(a[i] * a[i])), "sqrt", a[i]);
        }
    }
    const float values[] = {0.0f, -0.0f, 1.0f, -2.5f, kInfinity, -kInfinity, kNaN};
    for (const float a : values) {
        expect(same(broadcast(a)[kLanes - 1], a), "broadcast", a);
        for (const float b : values) {
            const Vec most = max(broadcast(a), broadcast(b)), least = min(broadcast(a), broadcast(b));
            expect(same(most[0], a > b ? a : b) && same(most[kLanes - 1], most[0]), "max", a);
            expect(same(least[0], a < b ? a : b), "min", a);
        }
    }
}

void check_functions() {
    for (double x = -87.2; x < 88.6; x += 0.00731) {
        const float value = static_cast<float>(x);
        const double truth = std::exp(static_cast<double>(value));
        expect(std::fabs(exp(broadcast(value))[0] - truth) <= truth * 0x1p-22, "exp", x);
    }
    expect(exp(broadcast(-100.0f))[0] == 0 && exp(broadcast(kNaN))[0] != exp(broadcast(kNaN))[0], "exp at its ends");
    for (double x = -8; x < 8; x += 0.00173) {
        const float value = static_cast<float>(x);
        const double phi = std::exp(-0.5 * value * value) * 0.3989422804014327;
        const double tail = 0.5 * std::erfc(-value * std::sqrt(0.5));
        Vec of_x, slope;
        gelu_with_slope(broadcast(value), of_x, slope);
        expect(std::fabs(gelu(broadcast(value))[0] - value * tail) <= 4e-7 * std::fabs(x), "gelu", x);
        expect(same(of_x[0], gelu(broadcast(value))[0]), "gelu_with_slope's value", x);
        expect(std::fabs(slope[0] - (tail + value * phi)) <= 8e-7, "gelu_with_slope's slope", x);
    }
    std::vector<float> scores = random_values(37 * 5 * kLanes), before = scores, inverses(5 * kLanes);
    powers({scores.data(), 37, 5 * kLanes, 5 * kLanes}, inverses.data());
    for (int column = 0; column < 5 * kLanes; ++column) {
        double most = -2, sum = 0;
        for (int row = 0; row < 37; ++row) {
            most = std::fmax(most, before[row * 5 * kLanes + column]);
        }
        for (int row = 0; row < 37; ++row) {
            const int at = row * 5 * kLanes + column;
            const double truth = std::exp2(before[at] - most);
            sum += truth;
            expect(std::fabs(scores[at] - truth) <= truth * 0x1p-21, "powers", column);
        }
        expect(std::fabs(inverses[column] * sum - 1) <= 0x1p-20, "powers' inverses", column);
    }
}

void check_lanes() {
    Vec rows[kLanes], before[kLanes];
    for (int i = 0; i < kLanes; ++i) {
        before[i] = rows[i] = random_vec();
        expect(lane_index()[i] == i, "lane_index", i);
    }
    transpose(rows);
    for (int i = 0; i < kLanes; ++i) {
        for (int j = 0; j < kLanes; ++j) {
            expect(same(rows[i][j], before[j][i]), "transpose", i);
        }
        rows[i] = before[i];
    }
    const Vec sums = sum_each(rows);
    for (int i = 0; i < kLanes; ++i) {
        double total = 0, most = -2;
        for (int j = 0; j < kLanes; ++j) {
            total += before[i][j];
            most = std::fmax(most, before[i][j]);
        }
        expect(std::fabs(sums[i] - total) < 1e-6 && std::fabs(sum(before[i]) - total) < 1e-6, "sum_each, sum", i);
        expect(largest(before[i]) == most, "largest", i);
    }
    IntVec backwards = kLanes - 1 - lane_index();
    const Vec second = select(before[0], before[1], backwards + kLanes),
              first = select(before[0], before[1], backwards);
    for (int i = 0; i < kLanes; ++i) {
        expect(same(first[i], before[0][kLanes - 1 - i]) && same(second[i], before[1][kLanes - 1 - i]), "select", i);
    }
    int64_t covered = 0;
    for_vectors(3 * kLanes + 1, [&](int64_t at, int64_t count) {
        expect(at == covered, "for_vectors", at);
        covered += count;
    });
    expect(covered == 3 * kLanes + 1, "for_vectors' end");
}

template <typename T>
void check_memory() {
    for (int count = 1; count <= kLanes; ++count) {
        T raw[kLanes + 1]{}, copy[kLanes + 1]{};
        store(raw, random_vec());
        const Vec all = load(raw), some = load(raw, count);
        store(copy, all, count);
        for (int i = 0; i < kLanes; ++i) {
            expect(same(some[i], i < count ? all[i] : 0.0f), "load of some", count);
            expect(same(load(copy)[i], i < count ? all[i] : 0.0f), "store of some", count);
        }
    }
}

// What a format's 16 bits stand for.
double value_of(uint16_t bits, Half) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const double special = fraction ? kNaN : kInfinity;
    const double finite = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
    return (bits >> 15 ? -1 : 1) * (exponent == 31 ? special : finite);
}
double value_of(uint16_t bits, BFloat16) {
    const int exponent = bits >> 7 & 255, fraction = bits & 127;
    const double special = fraction ? kNaN : kInfinity;
    const double finite = exponent ? std::ldexp(128 + fraction, exponent - 134) : std::ldexp(fraction, -133);
    return (bits >> 15 ? -1 : 1) * (exponent == 255 ? special : finite);
}

// bf16 for products is bf16 of normal numbers.
void check_factors() {
    for (uint32_t bits = 0; bits < 65536; ++bits) {
        for (const int beside : {0, 0x7fff, 0x8000, 0x8001}) {
            const uint32_t all = bits << 16 | beside;
            float value;
            memcpy(&value, &all, sizeof(value));
            if (std::isnormal(value) || std::isinf(value)) {
                BFloat16 storage[kLanes];
                Factor factors[kLanes];
                store(storage, broadcast(value));
                store(factors, broadcast(value));
                expect(storage[0].bits == factors[0].bits && storage[kLanes - 1].bits == factors[kLanes - 1].bits,
                       "to_factor", value);
            }
        }
    }
}

// All values to fp32 and back, and between neighbours: the middle goes to the even one, the rest to the nearer one.
template <typename T>
void check_conversions(uint16_t infinity) {
    const auto rounded = [](float value) {
        T raw[kLanes];
        store(raw, broadcast(value));
        expect(raw[0].bits == raw[kLanes - 1].bits, "equal lanes", value);
        return raw[0].bits;
    };
    for (uint32_t bits = 0; bits < 65536; ++bits) {
        const T raw{static_cast<uint16_t>(bits)};
        const float value = static_cast<float>(value_of(raw.bits, T{})), loaded = load(&raw, 1)[0];
        expect(same(loaded, value), "to_float", bits);
        const uint16_t back = rounded(value);
        expect(value == value ? back == bits : (back & infinity) == infinity && (back & 0x7fff) > infinity, "back",
               bits);
        const uint16_t sign = bits & 0x8000, low = bits & 0x7fff, high = low + 1;
        if (low >= infinity) {
            continue;
        }
        // beyond the largest value the next one would be, if it were finite
        const double next = high < infinity ? value_of(high, T{})
                                            : 2 * value_of(low, T{}) - value_of(static_cast<uint16_t>(low - 1), T{});
        const float middle = static_cast<float>((value_of(low, T{}) + next) / 2);
        const float signs = sign ? -1.0f : 1.0f;
        const bool normal = std::fabs(middle) >= std::numeric_limits<float>::min();
        expect(rounded(signs * middle) == (sign | (low % 2 ? high : low)), "the middle", bits);
        expect(rounded(signs * std::nextafterf(middle, 2 * middle)) == (sign | high), "above the middle", bits);
        expect(!normal || rounded(signs * std::nextafterf(middle, 0)) == (sign | low), "below the middle", bits);
    }
    expect(rounded(kInfinity) == infinity && (rounded(kNaN) & 0x7fff) > infinity, "no number");
}

void check_products() {
    for (int64_t rows = 1; rows <= 21; ++rows) {
        for (int64_t columns = kLanes; columns <= 10 * kLanes; columns += kLanes) {
            for (const int64_t depth : {0, 1, 7, 128, 300}) {
                const std::vector<float> a = random_values(rows * depth), b = random_values(depth * columns);
                const std::vector<float> start = random_values(rows * columns);
                std::vector<float> across(depth * rows), c = start, d = start;
                for (int64_t i = 0; i < rows * depth; ++i) {
                    across[i % depth * rows + i / depth] = a[i];
                }
                const Matrix<const float> right{b.data(), depth, columns, columns};
                product(Matrix<const float>{a.data(), rows, depth, depth}, right, {c.data(), rows, columns, columns},
                        Accumulate::no);
                product(transposed({across.data(), depth, rows, rows}), right, {d.data(), rows, columns, columns},
                        Accumulate::yes);
                for (int64_t i = 0; i < rows * columns; ++i) {
                    double sum = 0;
                    for (int64_t k = 0; k < depth; ++k) {
                        sum += static_cast<double>(a[i / columns * depth + k]) * b[k * columns + i % columns];
                    }
                    expect(std::fabs(c[i] - sum) < 1e-5, "product", depth);
                    expect(std::fabs(d[i] - sum - start[i]) < 1e-5, "product of a transposed matrix", depth);
                }
            }
        }
    }
}

float value_of(float value) { return value; }
float value_of(Factor value) { return static_cast<float>(value_of(value.bits, BFloat16{})); }

// What an operand becomes.
template <typename Value>
float factor(float value) {
    Value rounded[kLanes];
    store(rounded, broadcast(value));
    return value_of(rounded[0]);
}

// A weight of any width and strides, packed and multiplied.
template <typename Unit, typename T>
void check_packed() {
    using Value = typename Unit::Value;
    for (const int64_t columns : {1, 16, 33, 100}) {
        for (const int64_t depth : {1, 5, 48, 131}) {
            for (const bool turned : {false, true}) {
                std::vector<T> weight(columns * depth + kLanes);
                for (int64_t i = 0; i < columns * depth; ++i) {
                    store(&weight[i], broadcast(random_value()), 1);
                }
                const Weight w{weight.data(), columns, depth, turned ? 1 : depth, turned ? columns : 1};
                constexpr int64_t kRows = 9;
                const int64_t row = padded(depth);
                std::vector<Value> a(kRows * row);
                for (int64_t i = 0; i < kRows * row; ++i) {
                    store(&a[i], i % row < depth ? broadcast(random_value()) : Vec{}, 1);
                }
                std::vector<float> packed(Unit::packed_size(columns, depth) / sizeof(float));
                std::vector<float> c(kRows * padded(columns));
                const Unit unit;
                unit.template pack<T>(w, packed.data());
                unit.multiply({a.data(), kRows, depth, row}, packed.data(), {c.data(), kRows, columns, padded(columns)},
                              Accumulate::no);
                for (int64_t i = 0; i < kRows * columns; ++i) {
                    double sum = 0;
                    for (int64_t k = 0; k < depth; ++k) {
                        const T* of_weight = &weight[i % columns * w.column_stride + k * w.depth_stride];
                        sum += static_cast<double>(value_of(a[i / columns * row + k])) *
                               factor<Value>(load(of_weight, 1)[0]);
                    }
                    expect(std::fabs(c[i / columns * padded(columns) + i % columns] - sum) < 2e-5, "multiply", columns);
                }
            }
        }
    }
}

template <typename Unit>
void check_unit() {
    check_packed<Unit, float>();
    check_packed<Unit, BFloat16>();
    check_packed<Unit, Half>();
}

// Pairs, which half is which, and their products, rounded a few times.
void check_pairs() {
    for (int repeat = 0; repeat < 1000; ++repeat) {
        const Vec low = random_vec(), high = random_vec(), c = random_vec();
        const Bits a = to_pairs(low, high), b = to_pairs(high, c);
        const Vec sum = dot(a, b, c);
        for (int i = 0; i < kLanes; ++i) {
            const float of_low = factor<Factor>(low[i]), of_high = factor<Factor>(high[i]), of_c = factor<Factor>(c[i]);
            expect(same(value_of(Factor{static_cast<uint16_t>(a[i])}), of_low), "to_pairs, low", low[i]);
            expect(same(value_of(Factor{static_cast<uint16_t>(a[i] >> 16)}), of_high), "to_pairs, high", high[i]);
            const double products[] = {static_cast<double>(of_low) * of_high, static_cast<double>(of_high) * of_c};
            const double size = std::fabs(products[0]) + std::fabs(products[1]) + std::fabs(c[i]);
            expect(std::fabs(sum[i] - (c[i] + products[0] + products[1])) <= size * 0x1p-22, "dot", c[i]);
        }
    }
}

}  // namespace

int main() {
    check_arithmetic();
    check_functions();
    check_lanes();
    check_memory<float>();
    check_memory<BFloat16>();
    check_memory<Half>();
    check_conversions<BFloat16>(0x7f80);
    check_conversions<Half>(0x7c00);
    check_factors();
    check_products();
    check_pairs();
    check_unit<VectorUnit>();
    check_unit<DotUnit>();
    printf("%d failures\n", failures);
    return failures > 0;
}
