// pointwise_layer and its backward: a pointwise convolution with the norm in front of it, the GELU behind it and a
// residual. The arithmetic is in pointwise.h, that of the backward in the kernels of its pieces.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <string_view>
#include <tuple>

#include "activation.h"
#include "convolution.h"
#include "layer_norm_2d.h"

namespace ipt_fast::cpu {
namespace {

void check(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias, const OptionalTensor& residual) {
    check_image(x, "x");
    const int64_t columns = weight.dim() == 4 ? weight.size(0) : 0;
    TORCH_CHECK_VALUE(columns > 0, "weight must be (N, C, 1, 1); got shape ", weight.sizes());
    check_tensor(weight, "weight", {columns, x.size(1), 1, 1}, x);
    if (bias.has_value()) {
        check_tensor(*bias, "bias", {columns}, x, true);
    }
    if (residual.has_value()) {
        check_tensor(*residual, "residual", {x.size(0), columns, x.size(2), x.size(3)}, x);
    }
}

at::Tensor pointwise_layer(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                           const OptionalTensor& residual, const OptionalTensor& norm_weight,
                           const OptionalTensor& norm_bias, std::string_view activation, double eps, bool centered) {
    check(x, weight, bias, residual);
    const LayerNorm norm(x, norm_weight, norm_bias, eps, centered);
    return pointwise(x, weight, bias, norm.params, is_activated(activation), residual);
}

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Gradients pointwise_layer_backward(const at::Tensor& grad_, const at::Tensor& x_, const at::Tensor& weight_,
                                   const OptionalTensor& bias, const OptionalTensor& residual,
                                   const OptionalTensor& norm_weight_, const OptionalTensor& norm_bias_,
                                   std::string_view activation, double eps, bool centered) {
    check(x_, weight_, bias, residual);
    check_tensor(grad_, "grad", {x_.size(0), weight_.size(0), x_.size(2), x_.size(3)}, x_);
    const at::Tensor x = with_range(x_), weight = with_range(weight_);
    const OptionalTensor norm_weight = wide(norm_weight_), norm_bias = wide(norm_bias_);
    at::Tensor grad = channels_last(with_range(grad_));
    const at::Tensor normed = norm_weight ? layer_norm_2d(x, *norm_weight, norm_bias, eps, centered) : x;
    if (is_activated(activation)) {
        const at::Tensor projected = pointwise(normed, weight, bias);
        multiply_by_slope(grad, projected);
        grad = projected;
    }
    const ParameterGradients of_projection = pointwise_gradients(grad, normed, weight, bias);
    at::Tensor grad_x = pointwise_input_gradient(grad, weight);
    at::Tensor grad_norm_weight = at::empty({0}, at::kFloat), grad_norm_bias = grad_norm_weight;
    if (norm_weight) {
        std::tie(grad_x, grad_norm_weight, grad_norm_bias) =
            layer_norm_2d_backward(grad_x, x, *norm_weight, norm_bias, eps, centered);
    }
    const at::Tensor grad_residual = residual ? grad_.clone() : at::empty({0}, at::kFloat);  // never grad_ itself
    return {grad_x, of_projection.weight, of_projection.bias, grad_residual, grad_norm_weight, grad_norm_bias};
}

TORCH_LIBRARY_IMPL(ipt_fast_cpu, CPU, m) {
    m.impl("pointwise_layer", pointwise_layer);
    m.impl("pointwise_layer_backward", pointwise_layer_backward);
}

}  // namespace
}  // namespace ipt_fast::cpu
