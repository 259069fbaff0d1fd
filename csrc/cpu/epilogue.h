// What follows the last product of a layer: a bias and a gate, before the residual is added.
#pragma once

#include "arguments.h"

namespace ipt_fast::cpu {

// The epilogue of a layer: its arguments checked, and the tensors that `params` points into. `bias` is that of the
// product, padded or None; `gate` (C,), or (B, C) of each image. Without both, `params` is empty.
struct LayerEpilogue {
    LayerEpilogue(const at::Tensor& x, const OptionalTensor& bias, const OptionalTensor& gate);

    at::Tensor bias, gate;
    Epilogue params{};
};

}  // namespace ipt_fast::cpu
