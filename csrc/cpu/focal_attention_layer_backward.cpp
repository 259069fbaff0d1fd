// Backward of the focal attention layer, y = x + project(attention(depthwise(qkv(norm(x))))). Every intermediate is
// computed again and dropped after its last use; at most three maps of three times the channels exist at once.
#include <torch/library.h>

#include <tuple>

#include "convolution.h"
#include "groups.h"
#include "layer_norm_2d.h"

namespace ipt_fast::cpu {
namespace {

using T = const at::Tensor&;
using Tensors10 = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
                             at::Tensor, at::Tensor, at::Tensor>;

Tensors10 focal_attention_layer_backward(T grad_, T x_, T norm_weight, const OptionalTensor& norm_bias, T qkv_weight,
                                         T depthwise_weight, T project_weight, T temperature, T token_weight,
                                         T top_weight, T bottom_weight, int64_t num_heads, int64_t window_size,
                                         double eps, bool centered) {
    check_image(x_, "x");
    check_tensor(grad_, "grad", x_.sizes(), x_);
    check_tensor(depthwise_weight, "depthwise_weight", {3 * x_.size(1), 1, 3, 3}, x_);

    const at::Tensor grad = channels_last(grad_), x = channels_last(x_);
    at::Tensor normed = layer_norm_2d(x, norm_weight, norm_bias, eps, centered);
    at::Tensor projected = pointwise(normed, qkv_weight);
    at::Tensor qkv = depthwise(projected, depthwise_weight);
    const at::Tensor grad_project = pointwise_weight_gradient(
        grad,
        focal_channel_attention(qkv, temperature, token_weight, top_weight, bottom_weight, num_heads, window_size));
    auto [grad_qkv, grad_temperature, grad_token, grad_top, grad_bottom] =
        focal_channel_attention_backward(pointwise_input_gradient(grad, project_weight), qkv, temperature, token_weight,
                                         top_weight, bottom_weight, num_heads, window_size);
    qkv.reset();
    const at::Tensor grad_depthwise = depthwise_weight_gradient(grad_qkv, projected, 3);
    projected.reset();
    at::Tensor grad_projected = depthwise_input_gradient(grad_qkv, depthwise_weight);
    grad_qkv.reset();
    const at::Tensor grad_qkv_weight = pointwise_weight_gradient(grad_projected, normed);
    normed.reset();
    at::Tensor grad_normed = pointwise_input_gradient(grad_projected, qkv_weight);
    grad_projected.reset();
    auto [grad_x, grad_norm_weight, grad_norm_bias] =
        layer_norm_2d_backward(grad_normed, x, norm_weight, norm_bias, eps, centered);
    grad_x.add_(grad);
    return {grad_x,       grad_norm_weight, grad_norm_bias, grad_qkv_weight, grad_depthwise,
            grad_project, grad_temperature, grad_token,     grad_top,        grad_bottom};
}

}  // namespace

TORCH_LIBRARY_IMPL(ipt_fast_cpu, CPU, m) { m.impl("focal_attention_layer_backward", focal_attention_layer_backward); }

}  // namespace ipt_fast::cpu
