// gated_projection and its backward: checks, work partition, registration. The arithmetic of the forward is in
// gated_projection_kernel.cpp, the backward is made of convolutions and sums.
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "convolution.h"
#include "convolution_kernel.h"
#include "gated_projection_kernel.h"
#include "level.h"
#include "matrix_unit.h"
#include "work_space.h"

namespace ipt_fast::cpu {
namespace {

void check(const at::Tensor& x, const at::Tensor& other, const at::Tensor& channel_gate, const at::Tensor& pixel_gate,
           const at::Tensor& weight, const OptionalTensor& bias, const OptionalTensor& residual) {
    check_image(x, "x");
    check_tensor(other, "other", x.sizes(), x);
    check_of_images(channel_gate, "channel_gate", x);
    check_tensor(pixel_gate, "pixel_gate", {x.size(0), 1, x.size(2), x.size(3)}, x);
    const int64_t columns = weight.dim() == 4 ? weight.size(0) : 0;
    check_tensor(weight, "weight", {columns, x.size(1), 1, 1}, x);
    if (bias.has_value()) {
        check_tensor(*bias, "bias", {columns}, x, true);
    }
    if (residual.has_value()) {
        check_tensor(*residual, "residual", {x.size(0), columns, x.size(2), x.size(3)}, x);
    }
}

at::Tensor gated_projection(const at::Tensor& x_, const at::Tensor& other_, const at::Tensor& channel_gate_,
                            const at::Tensor& pixel_gate_, const at::Tensor& weight, const OptionalTensor& bias_,
                            const OptionalTensor& residual_) {
    check(x_, other_, channel_gate_, pixel_gate_, weight, bias_, residual_);
    const at::Tensor x = with_pixels(x_), other = with_pixels(other_), pixel_gate = pixel_gate_.contiguous();
    const at::Tensor residual = residual_.has_value() ? channels_last(*residual_) : at::Tensor();
    const at::Tensor channel_gate = padded_parameter(channel_gate_, padded(x.size(1)));
    const at::Tensor bias = padded_parameter(bias_, padded(weight.size(0)));
    const at::Tensor out = empty_channels_last({x.size(0), weight.size(0), x.size(2), x.size(3)}, x);
    GatedProjectionParams p{};
    p.dtype = dtype_of(x);
    p.brgemm = brgemm_of(p.dtype);
    p.x = pixels_of(x);
    p.other = pixels_of(other);
    p.channel_gate = channel_gate.const_data_ptr<float>();
    p.gate_stride = stride_of_images(channel_gate);
    p.pixel_gate = pixel_gate.const_data_ptr();
    p.image_pixels = x.size(2) * x.size(3);
    p.pixels = x.size(0) * p.image_pixels;
    p.channels = x.size(1);
    p.columns = weight.size(0);
    p.bias = bias.const_data_ptr<float>();
    p.residual = residual.defined() ? residual.const_data_ptr() : nullptr;
    p.out = out.mutable_data_ptr();
    const ConvolutionKernels& convolution = kernels_in_use<ConvolutionKernels>();
    const GatedProjectionKernels& kernel = kernels_in_use<GatedProjectionKernels>();
    WorkSpace work;
    const int64_t packed = work.add(convolution.packed_size(p.dtype, p.brgemm, p.columns, p.channels));
    const int64_t scratch = work.add(at::get_num_threads() * p.scratch() * static_cast<int64_t>(sizeof(float)));
    work.allocate();
    convolution.pack(p.dtype, p.brgemm, weight_of(weight), work.at<void>(packed));
    p.packed = work.at<void>(packed);
    at::parallel_for(0, (p.pixels + kGatedBlock - 1) / kGatedBlock, 1, [&](int64_t begin, int64_t end) {
        const ProductScope scope{p.brgemm};
        kernel.forward(p, begin, end, work.at<float>(scratch) + at::get_thread_num() * p.scratch());
    });
    return out;
}

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Gradients gated_projection_backward(const at::Tensor& grad_, const at::Tensor& x_, const at::Tensor& other_,
                                    const at::Tensor& channel_gate, const at::Tensor& pixel_gate_,
                                    const at::Tensor& weight_, const OptionalTensor& bias,
                                    const OptionalTensor& residual) {
    check(x_, other_, channel_gate, pixel_gate_, weight_, bias, residual);
    check_tensor(grad_, "grad", {x_.size(0), weight_.size(0), x_.size(2), x_.size(3)}, x_);
    const at::Tensor grad = channels_last(with_range(grad_)), weight = with_range(weight_);
    const at::Tensor x = wide(x_), other = wide(other_), pixel_gate = wide(pixel_gate_);
    const at::Tensor of_channels = wide(channel_gate).unsqueeze(-1).unsqueeze(-1);
    const at::Tensor mixed = (of_channels * x).add_(pixel_gate * other).to(grad.scalar_type());
    const ParameterGradients of_projection = pointwise_gradients(grad, mixed, weight, bias);
    const at::Tensor grad_mixed = wide(pointwise_input_gradient(grad, weight));
    at::Tensor grad_channel_gate = (grad_mixed * x).sum({2, 3});
    if (channel_gate.dim() == 1) {
        grad_channel_gate = grad_channel_gate.sum(0);
    }
    return {grad_mixed * of_channels,
            grad_mixed * pixel_gate,
            grad_channel_gate,
            (grad_mixed * other).sum(1, true),
            of_projection.weight,
            of_projection.bias,
            residual.has_value() ? grad_.clone() : at::empty({0}, at::kFloat)};  // never the upstream one itself
}

TORCH_LIBRARY_IMPL(ipt_fast_cpu, CPU, m) {
    m.impl("gated_projection", gated_projection);
    m.impl("gated_projection_backward", gated_projection_backward);
}

}  // namespace
}  // namespace ipt_fast::cpu
