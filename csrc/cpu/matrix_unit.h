// The processor's matrix unit, which multiplies matrices of bf16.
#pragma once

#include "kernels.h"

namespace ipt_fast::cpu {

// Emulated ones count.
bool has_matrix_unit();

// For tests, on processors without one: its products are computed by a plain loop.
void emulate_matrix_unit(bool on);

// What multiplies values of this dtype at the level in use: bf16 itself, or thirds of what is computed in fp32.
// nullptr: vectors.
Brgemm brgemm_of(DType dtype);

// Gives the matrix unit back at the end of a parallel region's share that used it.
struct ProductScope {
    Brgemm used;
    ~ProductScope();
};

}  // namespace ipt_fast::cpu
