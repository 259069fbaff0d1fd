// The layer norm of a map, its gradient, and the norm in front of a layer's projections.
#pragma once

#include <tuple>

#include "arguments.h"

namespace ipt_fast::cpu {

at::Tensor layer_norm_2d(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias, double eps,
                         bool centered);

// weight and bias are (C,), or (B, C) of each image.
// -> the gradients of x, weight and bias (empty where there is none).
std::tuple<at::Tensor, at::Tensor, at::Tensor> layer_norm_2d_backward(const at::Tensor& grad, const at::Tensor& x,
                                                                      const at::Tensor& weight,
                                                                      const OptionalTensor& bias, double eps,
                                                                      bool centered);

// The norm in front of a layer's projection: its arguments checked, and the tensors that `params` points into. Without
// a weight it is eps and centered only.
struct LayerNorm {
    LayerNorm(const at::Tensor& x, const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, double eps,
              bool centered);

    double eps;
    at::Tensor weight, bias;
    Norm params{};
};

}  // namespace ipt_fast::cpu
