#include "matrix_unit.h"

#include <ATen/native/CPUBlas.h>

#include <atomic>

#include "level.h"

namespace ipt_fast::cpu {
namespace {

std::atomic<bool> emulated = false;

void emulated_brgemm(Matrix<const uint16_t> a, const uint16_t* b, Matrix<float> c, Accumulate accumulate) {
    const auto* right = reinterpret_cast<const at::BFloat16*>(b);
    for (int64_t i = 0; i < c.rows; ++i) {
        const auto* left = reinterpret_cast<const at::BFloat16*>(a.row(i));
        for (int64_t j = 0; j < c.columns; ++j) {
            float sum = accumulate == Accumulate::yes ? c.row(i)[j] : 0.0f;
            for (int64_t k = 0; k < a.columns; ++k) {
                sum += static_cast<float>(left[k]) * static_cast<float>(right[(k / 2 * c.columns + j) * 2 + k % 2]);
            }
            c.row(i)[j] = sum;
        }
    }
}

void torch_brgemm(Matrix<const uint16_t> a, const uint16_t* b, Matrix<float> c, Accumulate accumulate) {
    at::native::cpublas::brgemm(c.rows, c.columns, a.columns, a.stride, c.columns, c.stride,
                                accumulate == Accumulate::yes, reinterpret_cast<const at::BFloat16*>(a.data),
                                reinterpret_cast<const at::BFloat16*>(b), c.data);
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
