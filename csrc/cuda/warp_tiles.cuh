// Products of matrices by a warp, in blocks of 16 x 16: operands from shared memory, sums in registers.
//
// T is bf16, fp16 or float. A block of A is 16 rows of depth<T>() columns, a block of B as many rows of 16 columns. In
// shared memory rows start 16 bytes aligned, and a stride of a multiple of 32 bytes plus 16 (see padded_row) keeps the
// rows of a block in different banks. WarpSums are float; products of float are exact unless TF32 is allowed.
//
// Lane i holds of a 16 x 8 block of sums: rows i / 4 and i / 4 + 8 in values {0, 1} and {2, 3}, columns 2 (i % 4) and
// the next.
#pragma once

#include "device.cuh"

namespace ipt_fast::cuda {

constexpr int kWarp = 32;

// Bytes of shared memory of a multiprocessor, of which 1024 go to each block beside its own.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kMultiprocessorShared = 164 << 10;
#else
constexpr int kMultiprocessorShared = 228 << 10;
#endif

IPT_FAST_DEVICE int lane_index() { return thread_index() % kWarp; }
IPT_FAST_DEVICE int warp_index() { return thread_index() / kWarp; }

// Columns of a block of A.
template <class T>
IPT_FAST_DEVICE constexpr int depth() {
    return sizeof(T) == 2 ? 16 : 8;
}

// Values from one row to the next, for rows of `width` values.
template <class T>
constexpr int padded_row(int width) {
    return width + 16 / (int)sizeof(T);
}

// ---- operands ------------------------------------------------------------------------------------------------------

struct BlockA {
    uint32_t words[4];
};
struct BlockB {
    uint32_t words[4];  // two for each half of its columns
};

// Element (row, k) at tile[row * stride + k].
template <class T>
IPT_FAST_DEVICE BlockA load_a(const T* tile, int stride) {
    BlockA a;
    const int lane = lane_index();
    if constexpr (sizeof(T) == 2) {
        load_matrices(a.words, tile + (lane & 15) * stride + (lane >> 4) * 8);
    } else {
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            a.words[w] = as_bits(tile[(lane / 4 + w % 2 * 8) * stride + lane % 4 + w / 2 * 4]);
        }
    }
    return a;
}

// Element (row, k) at at(k)[row].
template <class T, class At>
IPT_FAST_DEVICE BlockA load_a_transposed(At at) {
    BlockA a;
    const int lane = lane_index();
    if constexpr (sizeof(T) == 2) {
        load_matrices_transposed(a.words, at((lane >> 4) * 8 + (lane & 7)) + (lane >> 3 & 1) * 8);
    } else {
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            a.words[w] = as_bits(at(lane % 4 + w / 2 * 4)[lane / 4 + w % 2 * 8]);
        }
    }
    return a;
}

// Element (row, k) at tile[k * stride + row].
template <class T>
IPT_FAST_DEVICE BlockA load_a_transposed(const T* tile, int stride) {
    return load_a_transposed<T>([&](int k) { return tile + k * stride; });
}

// Element (k, column) at tile[column * stride + k], as weights (out, in) have it.
template <class T>
IPT_FAST_DEVICE BlockB load_b(const T* tile, int stride) {
    BlockB b;
    const int lane = lane_index();
    if constexpr (sizeof(T) == 2) {
        load_matrices(b.words, tile + ((lane >> 4) * 8 + (lane & 7)) * stride + (lane >> 3 & 1) * 8);
    } else {
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            b.words[w] = as_bits(tile[(lane / 4 + w / 2 * 8) * stride + lane % 4 + w % 2 * 4]);
        }
    }
    return b;
}

// Element (k, column) at at(k)[column].
template <class T, class At>
IPT_FAST_DEVICE BlockB load_b_transposed(At at) {
    BlockB b;
    const int lane = lane_index();
    if constexpr (sizeof(T) == 2) {
        load_matrices_transposed(b.words, at(lane & 15) + (lane >> 4) * 8);
    } else {
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            b.words[w] = as_bits(at(lane % 4 + w % 2 * 4)[lane / 4 + w / 2 * 8]);
        }
    }
    return b;
}
// Element (k, column) at tile[k * stride + column].
template <class T>
IPT_FAST_DEVICE BlockB load_b_transposed(const T* tile, int stride) {
    return load_b_transposed<T>([&](int k) { return tile + k * stride; });
}

// ---- products ------------------------------------------------------------------------------------------------------

// c (16 x 8) += a b, b's columns of the half; exact float by exchanging operands, an eighth as fast as FMA could be.
IPT_FAST_DEVICE void multiply_add_exact(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const int lane = lane_index();
#pragma unroll
    for (int k = 0; k < 8; ++k) {
        const int holder = k % 4;
        const float top = shuffle(as_float(a[k / 4 * 2]), (lane & ~3) + holder);
        const float bottom = shuffle(as_float(a[k / 4 * 2 + 1]), (lane & ~3) + holder);
        const float b = as_float(k < 4 ? b0 : b1);
        const float left = shuffle(b, lane % 4 * 8 + holder), right = shuffle(b, lane % 4 * 8 + 4 + holder);
        c[0] += top * left;
        c[1] += top * right;
        c[2] += bottom * left;
        c[3] += bottom * right;
    }
}

// c (16 x 16, in two halves of 8 columns) += a b. Collective.
template <class T>
IPT_FAST_DEVICE void multiply_add(float (&c)[2][4], const BlockA& a, const BlockB& b, bool tf32) {
    if constexpr (sizeof(T) == 2) {
        multiply_add(c[0], a.words, b.words[0], b.words[1], T{});
        multiply_add(c[1], a.words, b.words[2], b.words[3], T{});
    } else if (tf32) {
        multiply_add_tf32(c[0], a.words, b.words[0], b.words[1]);
        multiply_add_tf32(c[1], a.words, b.words[2], b.words[3]);
    } else {
        multiply_add_exact(c[0], a.words, b.words[0], b.words[1]);
        multiply_add_exact(c[1], a.words, b.words[2], b.words[3]);
    }
}

// ---- sums ----------------------------------------------------------------------------------------------------------

// Rows x columns of sums, in blocks of 16 x 16.
template <int Rows, int Columns>
struct WarpSums {
    static_assert(Rows % 16 == 0 && Columns % 16 == 0);
    static constexpr int kDown = Rows / 16, kAcross = Columns / 16;

    float values[kDown][kAcross][2][4];

    IPT_FAST_DEVICE void clear() {
#pragma unroll
        for (int i = 0; i < kDown; ++i) {
#pragma unroll
            for (int j = 0; j < kAcross; ++j) {
#pragma unroll
                for (int v = 0; v < 8; ++v) {
                    values[i][j][v / 4][v % 4] = 0;
                }
            }
        }
    }

    // f(row, column, two neighbours in this row) for all that this lane holds.
    template <class F>
    IPT_FAST_DEVICE void for_pairs(F f) {
        const int lane = lane_index();
#pragma unroll
        for (int i = 0; i < kDown; ++i) {
#pragma unroll
            for (int j = 0; j < kAcross; ++j) {
#pragma unroll
                for (int v = 0; v < 4; ++v) {
                    float* pair = &values[i][j][v / 2][v % 2 * 2];
                    f(i * 16 + lane / 4 + v % 2 * 8, j * 16 + v / 2 * 8 + lane % 4 * 2, pair);
                }
            }
        }
    }
};

// Columns k .. k + depth<T>() of sums in one row of blocks, rounded to T, as a block of A; k is a multiple of it.
template <class T, int Columns>
IPT_FAST_DEVICE BlockA as_a(const WarpSums<16, Columns>& sums, int k) {
    BlockA a;
    const auto& c = sums.values[0][k / 16];
    if constexpr (sizeof(T) == 2) {
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            a.words[w] = pack<T>(c[w / 2][w % 2 * 2], c[w / 2][w % 2 * 2 + 1]);
        }
    } else {
        const auto& half = c[k % 16 / 8];
        const int lane = lane_index();
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            const int holder = (lane & ~3) + lane % 4 / 2 + w / 2 * 2;
            const float even = shuffle(half[w % 2 * 2], holder), odd = shuffle(half[w % 2 * 2 + 1], holder);
            a.words[w] = as_bits(lane % 2 ? odd : even);
        }
    }
    return a;
}

// sums += a b, with a (Rows, k) at a[row * a_stride + k] and b (k, Columns) at b[column * b_stride + k].
template <class T, int Depth, int Rows, int Columns>
IPT_FAST_DEVICE void multiply(WarpSums<Rows, Columns>& sums, const T* a, int a_stride, const T* b, int b_stride,
                              bool tf32) {
    static_assert(Depth % depth<T>() == 0);
#pragma unroll
    for (int k = 0; k < Depth; k += depth<T>()) {
        BlockA rows[Rows / 16];
#pragma unroll
        for (int i = 0; i < Rows / 16; ++i) {
            rows[i] = load_a(a + i * 16 * a_stride + k, a_stride);
        }
#pragma unroll
        for (int j = 0; j < Columns / 16; ++j) {
            const BlockB block = load_b(b + j * 16 * b_stride + k, b_stride);
#pragma unroll
            for (int i = 0; i < Rows / 16; ++i) {
                multiply_add<T>(sums.values[i][j], rows[i], block, tf32);
            }
        }
    }
}

// Two neighbouring values to memory, shared or not; aligned to both.
template <class T>
IPT_FAST_DEVICE void store_pair(T* to, float first, float second) {
    if constexpr (sizeof(T) == 2) {
        *reinterpret_cast<uint32_t*>(to) = pack<T>(first, second);
    } else {
        store_words(to, {as_bits(first), as_bits(second)});
    }
}

template <class T>
IPT_FAST_DEVICE void load_pair(const T* from, float& first, float& second) {
    if constexpr (sizeof(T) == 2) {
        const uint32_t word = *reinterpret_cast<const uint32_t*>(from);
        first = to_float(T{(uint16_t)word});
        second = to_float(T{(uint16_t)(word >> 16)});
    } else {
        uint32_t words[2];
        load_words(words, from);
        first = as_float(words[0]);
        second = as_float(words[1]);
    }
}

// Value i of a small parameter, which is of T where `narrow`, else float.
template <class T>
IPT_FAST_DEVICE float small_value(const void* from, int64_t i, bool narrow) {
    if constexpr (sizeof(T) == 2) {
        if (narrow) {
            return to_float(static_cast<const T*>(from)[i]);
        }
    }
    return static_cast<const float*>(from)[i];
}

// ---- 16 bytes of values --------------------------------------------------------------------------------------------

template <class T>
struct Vector {
    static constexpr int kValues = 16 / sizeof(T);
    uint32_t words[4];

    IPT_FAST_DEVICE static Vector load(const T* from) {
        Vector vector;
        load_words(vector.words, from);
        return vector;
    }
    IPT_FAST_DEVICE void store(T* to) const { store_words(to, words); }
    IPT_FAST_DEVICE void store_global(T* to) const { ipt_fast::cuda::store_global(to, words); }

    IPT_FAST_DEVICE void unpack(float (&values)[kValues]) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if constexpr (sizeof(T) == 2) {
                values[2 * i] = to_float(T{(uint16_t)words[i]});
                values[2 * i + 1] = to_float(T{(uint16_t)(words[i] >> 16)});
            } else {
                values[i] = as_float(words[i]);
            }
        }
    }
    IPT_FAST_DEVICE static Vector of(const float (&values)[kValues]) {
        Vector vector;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if constexpr (sizeof(T) == 2) {
                vector.words[i] = pack<T>(values[2 * i], values[2 * i + 1]);
            } else {
                vector.words[i] = as_bits(values[i]);
            }
        }
        return vector;
    }
};

// ---- sharing work --------------------------------------------------------------------------------------------------

// Asynchronous copy of `rows` rows of `width` values, 16 bytes a thread and step, from from(row) (nullptr: zeros) to
// to + row * stride. By the whole block; to be committed and waited for.
template <class T, class From>
IPT_FAST_DEVICE void copy_rows(T* to, int stride, int rows, int width, From from) {
    constexpr int vector = 16 / sizeof(T);
    const int vectors = width / vector;
    for (int i = thread_index(); i < rows * vectors; i += block_threads()) {
        const int row = i / vectors, column = i % vectors * vector;
        const T* source = from(row);
        copy_async(to + row * stride + column, source == nullptr ? nullptr : source + column, source != nullptr);
    }
}

// The sum of x over the four lanes that hold a row of a block of sums, in all of them.
IPT_FAST_DEVICE float sum_of_row(float x) {
    x += shuffle_xor(x, 1);
    return x + shuffle_xor(x, 2);
}
IPT_FAST_DEVICE float max_of_row(float x) {
    float y = shuffle_xor(x, 1);
    x = x > y ? x : y;
    y = shuffle_xor(x, 2);
    return x > y ? x : y;
}

// 2^x within two units in the last place; less than 2^-126 is 0.
IPT_FAST_DEVICE float power_of_two(float x) {
#ifdef __CUDACC__
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return exp2f(x);
#endif
}

// 1 / x within a unit in the last place for x from 2^-126 to 2^126.
IPT_FAST_DEVICE float reciprocal(float x) {
#ifdef __CUDACC__
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return 1.0f / x;
#endif
}

// 1 / sqrt(x) within two units in the last place.
IPT_FAST_DEVICE float reciprocal_root(float x) {
#ifdef __CUDACC__
    return rsqrtf(x);
#else
    return 1.0f / sqrtf(x);
#endif
}

// Whether it is true in any lane, in all of them. Collective.
IPT_FAST_DEVICE bool any_lane(bool x) {
#ifdef __CUDACC__
    return __any_sync(0xffffffffu, x);
#else
    float any = x ? 1.0f : 0.0f;
    for (int mask = 1; mask < kWarp; mask *= 2) {
        any += shuffle_xor(any, mask);
    }
    return any > 0;
#endif
}

}  // namespace ipt_fast::cuda
