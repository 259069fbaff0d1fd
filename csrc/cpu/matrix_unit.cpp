#include "matrix_unit.h"

#include <ATen/native/CPUBlas.h>
#include <c10/util/bit_cast.h>

#include <atomic>

#include "level.h"

#if defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>

#include "tiles.h"
#endif

namespace ipt_fast::cpu {
namespace {

std::atomic<bool> emulated = false;

// Half 0 or 1 of a pair.
float half(Pair pair, int64_t which) {
    return c10::bit_cast<float>(which == 0 ? pair.bits << 16 : pair.bits & 0xffff0000);
}

void emulated_brgemm(Matrix<const Pair> a, Matrix<const Pair> b, Matrix<float> c, Accumulate accumulate) {
    for (int64_t i = 0; i < c.rows; ++i) {
        for (int64_t j = 0; j < c.columns; ++j) {
            float sum = 0.0f;
            for (int64_t k = 0; k < 2 * a.columns; ++k) {
                sum += half(a.row(i)[k / 2], k % 2) * half(b.row(k / 2)[j], k % 2);
            }
            c.row(i)[j] = accumulate == Accumulate::yes ? c.row(i)[j] + sum : sum;
        }
    }
}

void emulated_thirds(Matrix<const Pair> a, Matrix<const Pair> b, Matrix<float> c, Accumulate accumulate) {
    constexpr int64_t kPairs = kGroupDepth / 2, kGroupRow = 3 * kPairs;
    // Thirds of a and of b, the highest is 0.
    constexpr int64_t kProducts[][2] = {{2, 0}, {1, 0}, {1, 1}, {0, 1}, {0, 2}, {0, 0}};
    for (int64_t k = 0; k < a.columns; k += kGroupRow) {
        for (const auto [left, right] : kProducts) {
            const Matrix some{a.row(0) + k + left * kPairs, a.rows, kPairs, a.stride};
            emulated_brgemm(some, b.slice(k + right * kPairs, kPairs), c, accumulate);
            accumulate = Accumulate::yes;
        }
    }
}

#if defined(__x86_64__)

// The system gives a process the tiles' registers on request.
bool has_tiles() {
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return at::native::cpublas::could_pack(at::kBFloat16) &&
           syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

#else

bool has_tiles() { return false; }
void multiply_on_tiles(Matrix<const Pair>, Matrix<const Pair>, Matrix<float>, Accumulate) {}
void multiply_thirds_on_tiles(Matrix<const Pair>, Matrix<const Pair>, Matrix<float>, Accumulate) {}
void release_tiles() {}

#endif

}  // namespace

bool has_matrix_unit() {
    static const bool found = has_tiles();
    return found || emulated;
}

void emulate_matrix_unit(bool on) { emulated = on; }

Brgemm brgemm_of(DType dtype) {
    if (!kLevels[level()].matrix_unit) {
        return nullptr;
    }
    if (dtype == DType::bf16) {
        return emulated ? emulated_brgemm : multiply_on_tiles;
    }
    if (!kLevels[level()].splits) {
        return nullptr;
    }
    return emulated ? emulated_thirds : multiply_thirds_on_tiles;
}

ProductScope::~ProductScope() {
    if (used == multiply_on_tiles || used == multiply_thirds_on_tiles) {
        release_tiles();
    }
}

}  // namespace ipt_fast::cpu
