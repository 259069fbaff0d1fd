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

void check_norm(const at::Tensor& x, const at::Tensor& weight, const char* weight_name, const OptionalTensor& bias,
                const char* bias_name, double eps) {
    check_tensor(weight, weight_name, {x.size(1)}, x, true);
    if (bias.has_value()) {
        check_tensor(*bias, bias_name, {x.size(1)}, x, true);
    }
    TORCH_CHECK_VALUE(eps > 0 && std::isfinite(eps), "eps must be positive and finite; got ", eps);
}

void check(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias, double eps) {
    check_image(x, "x");
    check_norm(x, weight, "weight", bias, "bias", eps);
}

// x itself where a kernel can read it, else a channels-last copy.
at::Tensor readable(const at::Tensor& x) {
    return x.is_contiguous() ? x : x.contiguous(at::MemoryFormat::ChannelsLast);
}

Map map_of(const at::Tensor& x) { return {x.const_data_ptr(), x.is_contiguous(at::MemoryFormat::ChannelsLast)}; }

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
        params.weight = weight.const_data_ptr<float>();
        params.bias = bias.const_data_ptr<float>();
        params.eps = static_cast<float>(eps);
        params.centered = centered;
        params.out = out.mutable_data_ptr();
    }

    int64_t blocks() const { return x.size(0) * ((params.pixels + kBlockPixels - 1) / kBlockPixels); }

    at::Tensor x, weight, bias, out;
    LayerNorm2dParams params{};
};

// The shares' rows added one after the other, as a parameter's gradient.
at::Tensor sum_shares(const at::Tensor& shares, const at::Tensor& parameter) {
    at::Tensor out = at::zeros({shares.size(1)}, at::kDouble);
    for (int64_t share = 0; share < shares.size(0); ++share) {
        out.add_(shares.select(0, share));
    }
    return out.narrow(0, 0, parameter.size(0)).to(parameter.scalar_type());
}

}  // namespace

LayerNorm::LayerNorm(const at::Tensor& x, const at::Tensor& norm_weight, const OptionalTensor& norm_bias, double eps,
                     bool centered) {
    check_norm(x, norm_weight, "norm_weight", norm_bias, "norm_bias", eps);
    weight = padded_parameter(norm_weight, padded(x.size(1)));
    bias = padded_parameter(norm_bias, padded(x.size(1)));
    params = {weight.const_data_ptr<float>(), bias.const_data_ptr<float>(), static_cast<float>(eps), centered};
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
    const int64_t blocks = call.blocks(), shares = std::min(blocks, kShares);
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
