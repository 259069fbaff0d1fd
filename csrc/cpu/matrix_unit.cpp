#include "matrix_unit.h"

#include <ATen/native/CPUBlas.h>

#include <atomic>

#include "level.h"

namespace ipt_fast::cpu {
namespace {

std::atomic<bool> emulated = false;

void emulated_brgemm(int64_t rows, int64_t columns, int64_t depth, int64_t a_row, int64_t b_row, int64_t c_row,
                     bool accumulate, const uint16_t* a, const uint16_t* b, float* c) {
    const auto* left = reinterpret_cast<const at::BFloat16*>(a);
    const auto* right = reinterpret_cast<const at::BFloat16*>(b);
    for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < columns; ++j) {
            float sum = accumulate ? c[i * c_row + j] : 0.0f;
            for (int64_t k = 0; k < depth; ++k) {
                sum += static_cast<float>(left[i * a_row + k]) *
                       static_cast<float>(right[(k / 2 * b_row + j) * 2 + k % 2]);
            }
            c[i * c_row + j] = sum;
        }
    }
}

void torch_brgemm(int64_t rows, int64_t columns, int64_t depth, int64_t a_row, int64_t b_row, int64_t c_row,
                  bool accumulate, const uint16_t* a, const uint16_t* b, float* c) {
    at::native::cpublas::brgemm(rows, columns, depth, a_row, b_row, c_row, accumulate,
                                reinterpret_cast<const at::BFloat16*>(a), reinterpret_cast<const at::BFloat16*>(b), c);
}

}  // namespace

bool has_matrix_unit() {
    static const bool found = at::native::cpublas::could_pack(at::kBFloat16);
    return found || emulated;
}

void emulate_matrix_unit(bool on) { emulated = on; }

Brgemm brgemm() {
    if (!kLevels[level()].matrix_unit) {
        return nullptr;
    }
    return emulated ? emulated_brgemm : torch_brgemm;
}

BrgemmScope::~BrgemmScope() {
    if (used == torch_brgemm) {
        at::native::cpublas::brgemm_release();
    }
}

}  // namespace ipt_fast::cpu
