// depthwise_layer and its backward: a depthwise convolution with the norm in front of it and the GELU behind it. The
// arithmetic is in convolution_kernel.cpp, that of the backward in the kernels of its pieces.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <string_view>
#include <tuple>

#include "convolution.h"
#include "feed_forward_maps_kernel.h"
#include "layer_norm_2d.h"
#include "level.h"

namespace ipt_fast::cpu {
namespace {

constexpr int64_t kGrainValues = 1 << 14;  // fewer values than this are not worth a thread

bool is_activated(std::string_view activation) {
    TORCH_CHECK_VALUE(activation == "gelu" || activation == "none", "activation must be gelu or none; got ",
                      activation);
    return activation == "gelu";
}

at::Tensor depthwise_layer(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                           const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                           std::string_view activation, double eps, bool centered) {
    check_image(x, "x");
    const LayerNorm norm(x, norm_weight, norm_bias, eps, centered);
    return depthwise(x, weight, bias, norm.params, is_activated(activation));
}

// grad * GELU'(hidden), in the place of hidden.
void multiply_by_slope(const at::Tensor& grad, const at::Tensor& hidden) {
    const auto all_of = [](const at::Tensor& map) { return Channels{map.mutable_data_ptr(), map.size(1)}; };
    const int64_t channels = hidden.size(1);
    const ActivationParams params{dtype_of(hidden), channels, all_of(hidden), all_of(hidden), all_of(grad), {}};
    const auto& kernels = kernels_in_use<FeedForwardMapsKernels>();
    at::parallel_for(0, hidden.numel() / channels, std::max<int64_t>(kGrainValues / channels, 1),
                     [&](int64_t begin, int64_t end) { kernels.slope(params, begin, end); });
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
