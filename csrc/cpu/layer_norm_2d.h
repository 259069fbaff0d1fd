// The layer norm of a map, its gradient, and the norm in front of a layer's projections.
#pragma once

#include <tuple>

#include "arguments.h"

namespace ipt_fast::cpu {

at::Tensor layer_norm_2d(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias, double eps,
                         bool centered);

// -> the gradients of x, weight and bias (empty where there is none).
std::tuple<at::Tensor, at::Tensor, at::Tensor> layer_norm_2d_backward(const at::Tensor& grad, const at::Tensor& x,
                                                                      const at::Tensor& weight,
                                                                      const OptionalTensor& bias, double eps,
                                                                      bool centered);

// The norm in front of a layer's projection: its arguments checked, and the tensors that `params` points into.
struct LayerNorm {
    LayerNorm(const at::Tensor& x, const at::Tensor& norm_weight, const OptionalTensor& norm_bias, double eps,
              bool centered);

    at::Tensor weight, bias;
    Norm params;
};

}  // namespace ipt_fast::cpu
