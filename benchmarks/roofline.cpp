// The rates of this machine that bound every kernel, measured with the widest instructions the compiler may use
// (-march=native): fused multiply-adds of float32, products of bfloat16, and copies that do not fit the caches.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif
constexpr int chains = 12;  // more than latency times units, fewer than registers
constexpr int repeats = 15;
typedef float Vector __attribute__((vector_size(vector_bytes)));

// The most units a second of `work(thread)`, which does `units`, on all threads at once.
template <typename Work>
double best_rate(int threads, double units, Work work) {
    double best = 0;
    for (int repeat = 0; repeat < repeats; ++repeat) {
        std::atomic<int> ready{0};
        std::vector<double> seconds(threads);
        std::vector<std::thread> pool;
        for (int thread = 0; thread < threads; ++thread) {
            pool.emplace_back([&, thread] {
                ++ready;
                while (ready < threads) std::this_thread::yield();
                auto start = std::chrono::steady_clock::now();
                work(thread);
                seconds[thread] = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
            });
        }
        for (auto& each : pool) each.join();
        best = std::max(best, threads * units / *std::max_element(seconds.begin(), seconds.end()));
    }
    return best;
}

std::atomic<float> sink;  // what is stored here has to be computed

void multiply_add(long rounds) {
    Vector sums[chains] = {}, factor = {}, term = {};
    factor += 0.5f + sink, term += 1.0f;
    for (int i = 0; i < chains; ++i) sums[i] += i + sink;  // equal chains would be computed once
    for (long round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
        for (int i = 0; i < chains; ++i) sums[i] = sums[i] * factor + term;
    }
    for (int i = 1; i < chains; ++i) sums[0] += sums[i];
    if (sums[0][0] < 0) sink = sums[0][0];
}

#if defined(__AMX_BF16__)
constexpr double product_operations = 4 * 2.0 * 16 * 16 * 32;

bool products_allowed() {
    constexpr int request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

void products(long rounds) {
    struct alignas(64) Configuration {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {};
        uint8_t rows[16] = {};
    } configuration;
    for (int tile = 0; tile < 8; ++tile) configuration.row_bytes[tile] = 64, configuration.rows[tile] = 16;
    asm volatile("ldtilecfg %0" ::"m"(configuration));
    asm volatile(
        "tilezero %tmm0\n tilezero %tmm1\n tilezero %tmm2\n tilezero %tmm3\n"
        "tilezero %tmm4\n tilezero %tmm5\n tilezero %tmm6\n tilezero %tmm7");
    for (long round = 0; round < rounds; ++round)
        asm volatile(
            "tdpbf16ps %tmm6, %tmm4, %tmm0\n tdpbf16ps %tmm7, %tmm4, %tmm1\n"
            "tdpbf16ps %tmm6, %tmm5, %tmm2\n tdpbf16ps %tmm7, %tmm5, %tmm3");
    asm volatile("tilerelease");
}
#elif defined(__AVX512BF16__)
constexpr double product_operations = chains * 2.0 * 32;

bool products_allowed() { return true; }

void products(long rounds) {
    __m512 sums[chains];
    for (int i = 0; i < chains; ++i) sums[i] = _mm512_set1_ps(i + sink);  // equal chains would be computed once
    const __m512bh one = (__m512bh)_mm512_set1_epi16(0x3f80);
    for (long round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
        for (int i = 0; i < chains; ++i) sums[i] = _mm512_dpbf16_ps(sums[i], one, one);
    }
    for (int i = 1; i < chains; ++i) sums[0] += sums[i];
    if (sums[0][0] < 0) sink = sums[0][0];
}
#else
constexpr double product_operations = 0;

bool products_allowed() { return false; }

void products(long) {}
#endif

}  // namespace

extern "C" double fma_rate(int threads) {
    constexpr long rounds = 500000;
    const double operations = 2.0 * chains * (vector_bytes / sizeof(float)) * rounds;
    return best_rate(threads, operations, [](int) { multiply_add(rounds); });
}

// 0 where there is no such instruction.
extern "C" double bf16_rate(int threads) {
    constexpr long rounds = 300000;
    if (!products_allowed()) return 0;
    return best_rate(threads, product_operations * rounds, [](int) { products(rounds); });
}

// Bytes read and bytes written.
extern "C" double copy_rate(int threads) {
    constexpr size_t bytes = 128 << 20;
    const size_t part = bytes / threads / 64 * 64;
    std::vector<char> source(bytes, 1), target(bytes, 2);
    return best_rate(threads, 2.0 * part,
                     [&](int thread) { std::memcpy(&target[thread * part], &source[thread * part], part); });
}
