// depthwise_layer and its backward: a depthwise convolution with the norm in front of it and the GELU behind it. The
// arithmetic is in convolution_kernel.cpp, that of the backward in the kernels of its pieces.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <string_view>
#include <tuple>

#include "activation.h"
#include "convolution.h"
#include "layer_norm_2d.h"

namespace ipt_fast::cpu {
namespace {

at::Tensor depthwise_layer(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                           const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                           std::string_view activation, double eps, bool centered) {
    check_image(x, "x");
    const LayerNorm norm(x, norm_weight, norm_bias, eps, centered);
    return depthwise(x, weight, bias, norm.params, is_activated(activation));
}

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Gradients depthwise_layer_backward(const at::Tensor& grad_, const at::Tensor& x_, const at::Tensor& weight_,
                                   const OptionalTensor& bias, const OptionalTensor& norm_weight_,
                                   const OptionalTensor& norm_bias_, std::string_view activation, double eps,
                                   bool centered) {
    check_image(x_, "x");
    check_tensor(grad_, "grad", x_.sizes(), x_);
    const at::Tensor x = channels_last(with_range(x_)), weight = with_range(weight_);
    const OptionalTensor norm_weight = wide(norm_weight_), norm_bias = wide(norm_bias_);
    at::Tensor grad = channels_last(with_range(grad_));
    const at::Tensor normed = norm_weight ? layer_norm_2d(x, *norm_weight, norm_bias, eps, centered) : x;
    if (is_activated(activation)) {
        const at::Tensor convolved = depthwise(normed, weight, bias);
        multiply_by_slope(grad, convolved);
        grad = convolved;
    }
    const ParameterGradients of_taps = depthwise_gradients(grad, normed, weight.size(3), bias);
    at::Tensor grad_x = depthwise_input_gradient(grad, weight);
    at::Tensor grad_norm_weight = at::empty({0}, at::kFloat), grad_norm_bias = grad_norm_weight;
    if (norm_weight) {
        std::tie(grad_x, grad_norm_weight, grad_norm_bias) =
            layer_norm_2d_backward(grad_x, x, *norm_weight, norm_bias, eps, centered);
    }
    return {grad_x, of_taps.weight, of_taps.bias, grad_norm_weight, grad_norm_bias};
}

TORCH_LIBRARY_IMPL(ipt_fast_cpu, CPU, m) {
    m.impl("depthwise_layer", depthwise_layer);
    m.impl("depthwise_layer_backward", depthwise_layer_backward);
}

}  // namespace
}  // namespace ipt_fast::cpu
