// What the ATen sides of leffn and of its backward share.
#pragma once

#include "tensor.h"

namespace ipt_fast::cpu {

// x (B, C, H, W), expand (M, C, 1, 1), depthwise (M, 1, K, K) with odd K, project (N, M, 1, 1).
void check_leffn(const at::Tensor& x, const at::Tensor& expand, const at::Tensor& depthwise, const at::Tensor& project);

}  // namespace ipt_fast::cpu
