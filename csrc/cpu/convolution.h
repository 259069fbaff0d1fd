// Pointwise and depthwise convolutions of channels-last maps, without bias: what the layers' backwards are made of.
#pragma once

#include "arguments.h"

namespace ipt_fast::cpu {

// (B, C, H, W), weight (N, C, 1, 1) of the same dtype -> (B, N, H, W).
at::Tensor pointwise(const at::Tensor& x, const at::Tensor& weight);

// grad (B, N, H, W) -> (B, C, H, W).
at::Tensor pointwise_input_gradient(const at::Tensor& grad, const at::Tensor& weight);

// grad (B, N, H, W), x (B, C, H, W) -> (N, C, 1, 1) in x's dtype.
at::Tensor pointwise_weight_gradient(const at::Tensor& grad, const at::Tensor& x);

// (B, C, H, W), weight (C, 1, k, k) with k = 3 or 5, zero padding -> (B, C, H, W).
at::Tensor depthwise(const at::Tensor& x, const at::Tensor& weight);
at::Tensor depthwise_input_gradient(const at::Tensor& grad, const at::Tensor& weight);

// -> (C, 1, kernel, kernel) in x's dtype.
at::Tensor depthwise_weight_gradient(const at::Tensor& grad, const at::Tensor& x, int64_t kernel);

}  // namespace ipt_fast::cpu
