// layer_norm_2d and its backward: checks, work partition, registration. The arithmetic is in layer_norm_2d_kernel.cpp.
#include "layer_norm_2d.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

#include "layer_norm_2d_kernel.h"
#include "level.h"

namespace ipt_fast::cpu {
namespace {

// The gradient's partial sums belong to this many fixed shares of the blocks, whatever the number of threads.
constexpr int64_t kShares = 64;
// Fewer values than this are not worth a thread.
constexpr int64_t kGrainValues = 1 << 15;

void check_eps(double eps) {
    TORCH_CHECK_VALUE(eps > 0 && std::isfinite(eps), "eps must be positive and finite; got ", eps);
}

void check(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias, double eps) {
    check_image(x, "x");
    check_of_images(weight, "weight", x);
    if (bias.has_value()) {
        check_of_images(*bias, "bias", x);
    }
    check_eps(eps);
}

// x itself where a kernel can read it, else a channels-last copy.
at::Tensor readable(const at::Tensor& x) {
    return x.is_contiguous() ? x : x.contiguous(at::MemoryFormat::ChannelsLast);
}

Map map_of(const at::Tensor& x) { return {x.const_data_ptr(), x.is_contiguous(at::MemoryFormat::ChannelsLast)}; }

// Of padded parameters.
Norm norm_of(const at::Tensor& weight, const at::Tensor& bias, double eps, bool centered) {
    return {weight.const_data_ptr<float>(), bias.const_data_ptr<float>(), static_cast<float>(eps), centered,
            stride_of_images(weight),       stride_of_images(bias)};
}

// One call: the parameters and the tensors that they point into.
struct LayerNorm2dCall {
    LayerNorm2dCall(const at::Tensor& x_, const at::Tensor& weight_, const OptionalTensor& bias_, double eps,
                    bool centered)
        : x(readable(x_)), out(empty_channels_last(x_.sizes(), x_)) {
        const int64_t channels = x.size(1), padded_channels = cpu::padded(channels);
        weight = padded_parameter(weight_, padded_channels);
        bias = padded_parameter(bias_, padded_channels);
        params.dtype = dtype_of(x);
        params.x = map_of(x);
        params.channels = channels;
        params.padded_channels = padded_channels;
        params.pixels = x.size(2) * x.size(3);
        params.norm = norm_of(weight, bias, eps, centered);
        params.out = out.mutable_data_ptr();
    }

    int64_t blocks() const { return x.size(0) * ((params.pixels + kBlockPixels - 1) / kBlockPixels); }

    at::Tensor x, weight, bias, out;
    LayerNorm2dParams params{};
};

// The shares' rows added one after the other, as a parameter's gradient. One of each image has as many shares for each.
at::Tensor sum_shares(const at::Tensor& shares, const at::Tensor& parameter) {
    const int64_t images = parameter.dim() == 1 ? 1 : parameter.size(0);
    const at::Tensor of_images = shares.view({images, images == 0 ? 0 : shares.size(0) / images, shares.size(1)});
    at::Tensor out = at::zeros({images, shares.size(1)}, at::kDouble);
    for (int64_t share = 0; share < of_images.size(1); ++share) {
        out.add_(of_images.select(1, share));
    }
    return out.narrow(1, 0, parameter.size(-1)).reshape(parameter.sizes()).to(parameter.scalar_type());
}

}  // namespace

LayerNorm::LayerNorm(const at::Tensor& x, const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                     double eps_, bool centered)
    : eps(eps_) {
    check_eps(eps);
    params.eps = static_cast<float>(eps);
    params.centered = centered;
    TORCH_CHECK_VALUE(norm_weight.has_value() || !norm_bias.has_value(), "norm_bias must be None where norm_weight is");
    if (norm_weight.has_value()) {
        check_of_images(*norm_weight, "norm_weight", x);
        if (norm_bias.has_value()) {
            check_of_images(*norm_bias, "norm_bias", x);
        }
        weight = padded_parameter(norm_weight, padded(x.size(1)));
        bias = padded_parameter(norm_bias, padded(x.size(1)));
        params = norm_of(weight, bias, eps, centered);
    }
}

at::Tensor layer_norm_2d(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias, double eps,
                         bool centered) {
    check(x, weight, bias, eps);
    const LayerNorm2dCall call(x, weight, bias, eps, centered);
    const LayerNorm2dKernels& kernel = kernels_in_use<LayerNorm2dKernels>();
    const int64_t scratch_size = forward_scratch(call.params.padded_channels);
    const int64_t grain = std::max<int64_t>(1, kGrainValues / scratch_size);
    at::parallel_for(0, call.blocks(), grain, [&](int64_t begin, int64_t end) {
        const at::Tensor scratch = at::empty({scratch_size}, at::kFloat);
        kernel.forward(call.params, begin, end, scratch.mutable_data_ptr<float>());
    });
    return call.out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> layer_norm_2d_backward(const at::Tensor& grad, const at::Tensor& x,
                                                                      const at::Tensor& weight,
                                                                      const OptionalTensor& bias, double eps,
                                                                      bool centered) {
    check(x, weight, bias, eps);
    check_tensor(grad, "grad", x.sizes(), x);
    LayerNorm2dCall call(x, weight, bias, eps, centered);
    const at::Tensor readable_grad = readable(grad);
    call.params.grad = map_of(readable_grad);
    const int64_t padded_channels = call.params.padded_channels;
    // Gradients of each image are sums over shares of one image.
    const int64_t images = weight.dim() > 1 || (bias.has_value() && bias->dim() > 1) ? x.size(0) : 1;
    const int64_t blocks = call.blocks(), of_image = images == 0 ? 0 : blocks / images;
    const int64_t shares = images * std::min(of_image, std::max<int64_t>(kShares / std::max<int64_t>(images, 1), 1));
    const at::Tensor grad_weights = at::zeros({shares, padded_channels}, at::kDouble);
    const at::Tensor grad_biases = at::zeros({shares, padded_channels}, at::kDouble);
    const LayerNorm2dKernels& kernel = kernels_in_use<LayerNorm2dKernels>();
    const int64_t scratch_size = backward_scratch(padded_channels);
    const int64_t values_per_share = shares == 0 ? 1 : call.x.numel() / shares;
    const int64_t grain = std::max<int64_t>(1, kGrainValues / values_per_share);
    double* const grad_weight = grad_weights.mutable_data_ptr<double>();
    double* const grad_bias = grad_biases.mutable_data_ptr<double>();
    at::parallel_for(0, shares, grain, [&](int64_t begin, int64_t end) {
        const at::Tensor scratch = at::empty({scratch_size}, at::kFloat);
        for (int64_t share = begin; share < end; ++share) {
            kernel.backward(call.params, share * blocks / shares, (share + 1) * blocks / shares,
                            scratch.mutable_data_ptr<float>(), grad_weight + share * padded_channels,
                            grad_bias + share * padded_channels);
        }
    });
    return {call.out, sum_shares(grad_weights, weight),
            bias.has_value() ? sum_shares(grad_biases, *bias) : at::empty({0}, at::kFloat)};
}

TORCH_LIBRARY_IMPL(ipt_fast_cpu, CPU, m) {
    m.impl("layer_norm_2d", layer_norm_2d);
    m.impl("layer_norm_2d_backward", layer_norm_2d_backward);
}

}  // namespace ipt_fast::cpu
