// The functions of device.cuh on the CPU: blocks run one after another, every thread of a block on a stack of its own.
//
// It checks more than a GPU does: shared memory begins as NaN and its accesses through collectives stay inside it,
// addresses are aligned, asynchronous copies arrive no sooner than they are waited for, lanes of a warp call the same
// collective, and no thread is missing at a barrier. Threads run in one of two orders (set_reversed): kernels whose
// results differ between them lack a barrier.
#pragma once

#include <stdint.h>
#include <string.h>

#include <cmath>

#define IPT_FAST_KERNEL void
#define IPT_FAST_BOUNDS(threads, blocks)
#define IPT_FAST_DEVICE inline
#define IPT_FAST_ARGUMENTS(type) const type

namespace ipt_fast::cuda {

struct bf16 {
    uint16_t bits;
};
struct fp16 {
    uint16_t bits;
};

inline uint32_t as_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}
inline float as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return as_float((uint32_t)x.bits << 16); }
inline float to_float(fp16 x) {
    _Float16 value;
    memcpy(&value, &x, 2);
    return (float)value;
}

template <class T>
inline T from_float(float x);
template <>
inline float from_float<float>(float x) {
    return x;
}
template <>
inline bf16 from_float<bf16>(float x) {
    const uint32_t bits = as_bits(x);
    if (x != x) {
        return {0x7fff};
    }
    return {(uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline fp16 from_float<fp16>(float x) {
    const _Float16 value = (_Float16)x;
    fp16 result;
    memcpy(&result, &value, 2);
    return result;
}

template <class T>
inline uint32_t pack(float low, float high) {
    return from_float<T>(low).bits | (uint32_t)from_float<T>(high).bits << 16;
}

namespace emulator {

constexpr int kWarp = 32;

// What a thread brings to a collective and takes from it; `operation` tells collectives apart.
struct Exchange {
    const void* operation;
    const void* in;
    void* out;
};

int thread_index();
int64_t block_index();
int block_threads();
unsigned char* shared_memory();
void sync_block();
// Runs `all` once, when every lane of the warp has come, with what they brought.
void collective(const Exchange& mine, void (*all)(const Exchange (&lanes)[kWarp]));
void check_shared(const void* address, int bytes);
void check_aligned(const void* address, int bytes);
void copy_async(void* to, const void* from, bool there);
void copy_commit();
void copy_wait(int pending);
[[noreturn]] void fail(const char* message);
// 1; of the GPU that launches are recorded for, an H100 or H200, 132.
int multiprocessors();
// Instead of running it, writes a launch to the file that IPT_FAST_EMULATED_RECORD names, if it does: a line of the
// kernel's place in this library, blocks, threads, bytes of shared memory, and the parameters, all but the numbers hex.
bool recorded(const void* kernel, const void* arguments, size_t arguments_bytes, int64_t blocks, int threads,
              int shared_bytes);
void run(void (*body)(const void* kernel, const void* arguments), const void* kernel, const void* arguments,
         int64_t blocks, int threads, int shared_bytes);
void set_reversed(bool reversed);

void shuffle_all(const Exchange (&lanes)[kWarp]);
void load_matrices_all(const Exchange (&lanes)[kWarp]);
void load_matrices_transposed_all(const Exchange (&lanes)[kWarp]);

template <class T>
struct MultiplyAdd {
    float* c;
    const uint32_t* a;
    uint32_t b[2];
};

// Operands of lane i: in 16 bits, word w of a holds row i / 4 + 8 (w % 2), columns 2 (i % 4) + 8 (w / 2) and the next;
// word w of b column i / 4, rows 2 (i % 4) + 8 w and the next. In 32 bits row i / 4 + 8 (w % 2), column
// i % 4 + 4 (w / 2); column i / 4, row i % 4 + 4 w. Value v of c: row i / 4 + 8 (v / 2), column 2 (i % 4) + v % 2.
template <class T>
void multiply_add_all(const Exchange (&lanes)[kWarp]) {
    constexpr int per_word = sizeof(T) == 2 ? 2 : 1, depth = 8 * per_word;
    float a[16][depth], b[depth][8];
    auto value = [](uint32_t word, int half) {
        if constexpr (sizeof(T) == 2) {
            return to_float(T{(uint16_t)(word >> 16 * half)});
        } else {
            return as_float((as_bits(as_float(word)) + 0x1000) & ~0x1fffu);  // rounded to TF32
        }
    };
    for (int lane = 0; lane < kWarp; ++lane) {
        const auto& in = *static_cast<const MultiplyAdd<T>*>(lanes[lane].in);
        const int group = lane / 4, first = lane % 4 * per_word;
        for (int half = 0; half < per_word; ++half) {
            for (int word = 0; word < 4; ++word) {
                a[group + word % 2 * 8][first + half + word / 2 * depth / 2] = value(in.a[word], half);
            }
            for (int word = 0; word < 2; ++word) {
                b[first + half + word * depth / 2][group] = value(in.b[word], half);
            }
        }
    }
    for (int lane = 0; lane < kWarp; ++lane) {
        float* c = static_cast<const MultiplyAdd<T>*>(lanes[lane].in)->c;
        for (int v = 0; v < 4; ++v) {
            const int row = lane / 4 + v / 2 * 8, column = lane % 4 * 2 + v % 2;
            float sum = 0;
            for (int k = 0; k < depth; ++k) {
                sum += a[row][k] * b[k][column];
            }
            c[v] += sum;
        }
    }
}

template <class T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const MultiplyAdd<T> in = {c, a, {b0, b1}};
    collective({(const void*)&multiply_add_all<T>, &in, nullptr}, multiply_add_all<T>);
}

}  // namespace emulator

template <int N>
inline void load_words(uint32_t (&words)[N], const void* from) {
    emulator::check_aligned(from, sizeof(words));
    memcpy(words, from, sizeof(words));
}
template <int N>
inline void store_words(void* to, const uint32_t (&words)[N]) {
    emulator::check_aligned(to, sizeof(words));
    memcpy(to, words, sizeof(words));
}
template <int N>
inline void store_global(void* to, const uint32_t (&words)[N]) {
    store_words(to, words);
}

inline int thread_index() { return emulator::thread_index(); }
inline int64_t block_index() { return emulator::block_index(); }
inline int block_threads() { return emulator::block_threads(); }
template <class T>
inline T* shared_memory() {
    return reinterpret_cast<T*>(emulator::shared_memory());
}
inline void sync_block() { emulator::sync_block(); }
inline void sync_warp() {
    emulator::collective({(const void*)&sync_warp, nullptr, nullptr}, [](const emulator::Exchange(&)[32]) {});
}

struct Shuffle {
    float value;
    int from;
};
inline float shuffle(float x, int lane) {
    const Shuffle in = {x, lane};
    float out;
    emulator::collective({(const void*)&emulator::shuffle_all, &in, &out}, emulator::shuffle_all);
    return out;
}
inline float shuffle_xor(float x, int mask) { return shuffle(x, thread_index() % 32 ^ mask); }

inline void copy_async(void* to, const void* from, bool there) { emulator::copy_async(to, from, there); }
inline void copy_commit() { emulator::copy_commit(); }
template <int Pending>
inline void copy_wait() {
    emulator::copy_wait(Pending);
}

inline void load_matrices(uint32_t (&words)[4], const void* row) {
    emulator::collective({(const void*)&emulator::load_matrices_all, row, words}, emulator::load_matrices_all);
}
inline void load_matrices_transposed(uint32_t (&words)[4], const void* row) {
    emulator::collective({(const void*)&emulator::load_matrices_transposed_all, row, words},
                         emulator::load_matrices_transposed_all);
}

inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bf16) {
    emulator::multiply_add<bf16>(c, a, b0, b1);
}
inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, fp16) {
    emulator::multiply_add<fp16>(c, a, b0, b1);
}
inline void multiply_add_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emulator::multiply_add<float>(c, a, b0, b1);
}

struct Configuration {
    int64_t blocks;
    int threads;
    int shared_bytes;
    void* stream;
};

// Throws std::runtime_error if a check fails.
template <class P>
void launch(void (*kernel)(P), const P& arguments, const Configuration& c) {
    auto body = [](const void* kernel, const void* arguments) {
        reinterpret_cast<void (*)(P)>(const_cast<void*>(kernel))(*static_cast<const P*>(arguments));
    };
    if (!emulator::recorded((const void*)kernel, &arguments, sizeof(P), c.blocks, c.threads, c.shared_bytes)) {
        emulator::run(body, (const void*)kernel, &arguments, c.blocks, c.threads, c.shared_bytes);
    }
}

}  // namespace ipt_fast::cuda
