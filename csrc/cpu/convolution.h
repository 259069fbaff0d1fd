// Pointwise and depthwise convolutions of channels-last maps: what the layers' backwards are made of.
#pragma once

#include "arguments.h"

namespace ipt_fast::cpu {

// (B, C, H, W), weight (N, C, 1, 1) of the same dtype, bias (N,) -> (B, N, H, W). With a norm in front of it
// (norm.weight == nullptr: there is none), a GELU behind it where it is `activated`, and a residual like the result.
at::Tensor pointwise(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias = {},
                     const Norm& norm = {}, bool activated = false, const OptionalTensor& residual = {});

// Of gate * (weight x + bias), the gate being (N,) or (B, N): grad (B, N, H, W) -> (B, C, H, W).
at::Tensor pointwise_input_gradient(const at::Tensor& grad, const at::Tensor& weight, const OptionalTensor& gate = {});

// The gradients of a convolution's parameters in fp32, in their shapes; empty for those that are absent.
struct ParameterGradients {
    at::Tensor weight, bias, gate;
};

// Of gate * (weight x + bias): grad (B, N, H, W), x (B, C, H, W).
ParameterGradients pointwise_gradients(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight,
                                       const OptionalTensor& bias = {}, const OptionalTensor& gate = {});

// (B, C, H, W), weight (C, 1, k, k) with odd k, bias (C,), zero padding -> (B, C, H, W). With a norm in front of it
// (norm.weight == nullptr: there is none), and a GELU behind it where it is `activated`.
at::Tensor depthwise(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias = {},
                     const Norm& norm = {}, bool activated = false);
at::Tensor depthwise_input_gradient(const at::Tensor& grad, const at::Tensor& weight);
ParameterGradients depthwise_gradients(const at::Tensor& grad, const at::Tensor& x, int64_t kernel,
                                       const OptionalTensor& bias = {});

}  // namespace ipt_fast::cpu
