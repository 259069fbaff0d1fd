// dense_convolution and its backward: checks, work partition, registration. The arithmetic is in
// dense_convolution_kernel.cpp, that of the backward and of bf16, where a unit multiplies it, PyTorch's.
#include <ATen/Parallel.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/gelu_backward.h>
#include <torch/library.h>

#include <tuple>

#include "activation.h"
#include "arguments.h"
#include "dense_convolution_kernel.h"
#include "level.h"
#include "matrix_unit.h"
#include "work_space.h"

namespace ipt_fast::cpu {
namespace {

void check(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias) {
    check_image(x, "x");
    const int64_t columns = weight.dim() == 4 ? weight.size(0) : 0;
    TORCH_CHECK_VALUE(columns > 0, "weight must be (N, C, 3, 3); got shape ", weight.sizes());
    check_tensor(weight, "weight", {columns, x.size(1), 3, 3}, x);
    if (bias.has_value()) {
        check_tensor(*bias, "bias", {columns}, x, true);
    }
}

at::Tensor convolve_by_pytorch(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias, bool gelu) {
    const OptionalTensor of_dtype = bias.has_value() ? OptionalTensor(bias->to(x.scalar_type())) : std::nullopt;
    at::Tensor out = at::conv2d(x, weight, of_dtype, {1, 1}, {1, 1});
    return gelu ? at::gelu_(out) : out;
}

at::Tensor convolve(const at::Tensor& map, const at::Tensor& weight_, const OptionalTensor& bias_, bool gelu) {
    const KeptLevel level;
    const DenseConvolutionKernels& kernel = kernels_in_use<DenseConvolutionKernels>();
    const at::Tensor x = channels_last(map), weight = weight_.contiguous();
    DenseConvolutionParams p{};
    p.dtype = dtype_of(x);
    p.brgemm = brgemm_of(p.dtype);
    if (!kernel.takes(p)) {
        return convolve_by_pytorch(x, weight, bias_, gelu);
    }
    const at::Tensor out = empty_channels_last({x.size(0), weight.size(0), x.size(2), x.size(3)}, x);
    const at::Tensor bias = padded_parameter(bias_, padded(weight.size(0)));
    p.x = x.const_data_ptr();
    p.images = x.size(0);
    p.height = x.size(2);
    p.width = x.size(3);
    p.channels = x.size(1);
    p.columns = weight.size(0);
    p.weight = weight.const_data_ptr();
    p.bias = bias_.has_value() ? bias.const_data_ptr<float>() : nullptr;
    p.gelu = gelu;
    p.out = out.mutable_data_ptr();
    p.threads = at::get_num_threads();
    const int64_t floats = kernel.scratch(p);
    WorkSpace work;
    const int64_t packed = work.add(kernel.packed_size(p));
    const int64_t packing = work.add(kernel.packing_scratch(p) * static_cast<int64_t>(sizeof(float)));
    const int64_t scratch = work.add(p.threads * floats * static_cast<int64_t>(sizeof(float)));
    work.allocate();
    p.packed = work.at<void>(packed);
    kernel.pack(p, work.at<float>(packing));
    at::parallel_for(0, kernel.tasks(p), 1, [&](int64_t begin, int64_t end) {
        const ProductScope scope{p.brgemm};
        kernel.forward(p, begin, end, work.at<float>(scratch) + at::get_thread_num() * floats);
    });
    return out;
}

at::Tensor dense_convolution(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                             std::string_view activation) {
    check(x, weight, bias);
    return convolve(x, weight, bias, is_activated(activation));
}

// -> the gradients of x, weight and bias (empty where there is none).
std::tuple<at::Tensor, at::Tensor, at::Tensor> dense_convolution_backward(const at::Tensor& grad_, const at::Tensor& x,
                                                                          const at::Tensor& weight,
                                                                          const OptionalTensor& bias,
                                                                          std::string_view activation) {
    check(x, weight, bias);
    check_tensor(grad_, "grad", {x.size(0), weight.size(0), x.size(2), x.size(3)}, x);
    at::Tensor grad = channels_last(with_range(grad_));
    const at::Tensor images = channels_last(with_range(x)), taps = with_range(weight);
    if (is_activated(activation)) {
        grad = at::gelu_backward(grad, convolve(images, taps, bias, false));
    }
    const auto [of_x, of_weight, unused] = at::convolution_backward(grad, images, taps, std::nullopt, {1, 1}, {1, 1},
                                                                    {1, 1}, false, {0, 0}, 1, {true, true, false});
    return {of_x, of_weight, bias.has_value() ? grad.sum({0, 2, 3}, false, at::kFloat) : at::empty({0}, at::kFloat)};
}

TORCH_LIBRARY_IMPL(ipt_fast_cpu, CPU, m) {
    m.impl("dense_convolution", dense_convolution);
    m.impl("dense_convolution_backward", dense_convolution_backward);
}

}  // namespace
}  // namespace ipt_fast::cpu
