// The activation behind a convolution: its name, and its part of the backward.
#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>

namespace ipt_fast::cpu {

// Whether the activation is GELU; raises for another than "gelu" and "none".
bool is_activated(std::string_view activation);

// grad * GELU'(hidden), in the place of hidden; both are dense channels-last maps.
void multiply_by_slope(const at::Tensor& grad, const at::Tensor& hidden);

}  // namespace ipt_fast::cpu
