// Pointwise and depthwise convolutions and their gradients: checks, work partition.
#include "convolution.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "convolution_kernel.h"
#include "level.h"
#include "matrix_unit.h"
#include "work_space.h"

namespace ipt_fast::cpu {
namespace {

// A weight's gradient is summed in about this many fixed shares, fewer where they would be small or need much memory.
constexpr int64_t kShares = 64;
constexpr int64_t kLeastRuns = 4;
constexpr int64_t kShareBytes = 16 << 20;
// The rows of a strip under the kernel have this much of the second cache.
constexpr int64_t kStripFloats = 64 << 10;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

at::Tensor scratch_of(int64_t floats) { return at::empty({floats}, at::kFloat); }

void check_gradient(const at::Tensor& grad, const at::Tensor& x) {
    check_image(x, "x");
    check_tensor(grad, "grad", {x.size(0), grad.dim() == 4 ? grad.size(1) : 0, x.size(2), x.size(3)}, x);
}

at::Tensor multiply(const at::Tensor& map, const Weight& weight) {
    const at::Tensor x = channels_last(map);
    const at::Tensor out = empty_channels_last({x.size(0), weight.columns, x.size(2), x.size(3)}, x);
    const ConvolutionKernels& kernel = kernels_in_use<ConvolutionKernels>();
    PointwiseParams p{};
    p.dtype = dtype_of(x);
    p.brgemm = brgemm_of(p.dtype);
    p.x = x.const_data_ptr();
    p.pixels = x.size(0) * x.size(2) * x.size(3);
    p.channels = weight.depth;
    p.columns = weight.columns;
    p.out = out.mutable_data_ptr();
    const int64_t scratch_size = pointwise_scratch(p.channels, p.columns);
    WorkSpace work;
    const int64_t packed = work.add(kernel.packed_size(p.dtype, p.brgemm, p.columns, p.channels));
    const int64_t scratch = work.add(at::get_num_threads() * scratch_size * static_cast<int64_t>(sizeof(float)));
    work.allocate();
    kernel.pack(p.dtype, p.brgemm, weight, work.at<void>(packed));
    p.packed = work.at<void>(packed);
    const int64_t blocks = divide_up(p.pixels, kPointwiseBlock);
    at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
        const ProductScope scope{p.brgemm};
        kernel.pointwise(p, begin, end, work.at<float>(scratch) + at::get_thread_num() * scratch_size);
    });
    return out;
}

DepthwiseParams depthwise_params(const at::Tensor& x, int64_t kernel) {
    DepthwiseParams p{};
    p.dtype = dtype_of(x);
    p.kernel = kernel;
    p.x = x.const_data_ptr();
    p.channels = x.size(1);
    p.height = x.size(2);
    p.width = x.size(3);
    const int64_t fitting = kStripFloats / (padded(p.channels) * kernel) - (kernel - 1);
    p.strips = divide_up(p.width, std::max<int64_t>(fitting, 16));
    return p;
}

// The weight (channels, 1, k, k) as [tap][padded channels], `flipped` by the centre for the gradient of the input.
at::Tensor taps_of(const at::Tensor& weight, bool flipped) {
    const at::Tensor taps = weight.flatten(1).t();
    return padded_parameter(flipped ? taps.flip(0) : taps, padded(weight.size(0)));
}

at::Tensor convolve(const at::Tensor& map, const at::Tensor& weight, bool flipped) {
    check_image(map, "x");
    const int64_t kernel = weight.dim() == 4 ? weight.size(3) : 0;
    TORCH_CHECK_VALUE(kernel == 3 || kernel == 5, "weight must have 3x3 or 5x5 taps; got shape ", weight.sizes());
    check_tensor(weight, "weight", {map.size(1), 1, kernel, kernel}, map);
    const at::Tensor x = channels_last(map), out = empty_channels_last(x.sizes(), x), taps = taps_of(weight, flipped);
    DepthwiseParams p = depthwise_params(x, kernel);
    p.weight = taps.const_data_ptr<float>();
    p.out = out.mutable_data_ptr();
    const ConvolutionKernels& kernels = kernels_in_use<ConvolutionKernels>();
    at::parallel_for(0, x.size(0) * p.strips * p.height, 4, [&](int64_t begin, int64_t end) {
        kernels.depthwise(p, begin, end, scratch_of(p.scratch()).mutable_data_ptr<float>());
    });
    return out;
}

}  // namespace

at::Tensor pointwise(const at::Tensor& x, const at::Tensor& weight) {
    check_image(x, "x");
    check_tensor(weight, "weight", {weight.dim() == 4 ? weight.size(0) : 0, x.size(1), 1, 1}, x);
    return multiply(x, weight_of(weight));
}

at::Tensor pointwise_input_gradient(const at::Tensor& grad, const at::Tensor& weight) {
    check_image(grad, "grad");
    check_tensor(weight, "weight", {grad.size(1), weight.dim() == 4 ? weight.size(1) : 0, 1, 1}, grad);
    return multiply(grad, transposed(weight_of(weight)));
}

at::Tensor pointwise_weight_gradient(const at::Tensor& grad, const at::Tensor& x) {
    check_gradient(grad, x);
    const at::Tensor images = channels_last(x), grads = channels_last(grad);
    PointwiseWeightParams p{};
    p.dtype = dtype_of(x);
    p.brgemm = brgemm_of(p.dtype);
    p.x = images.const_data_ptr();
    p.grad = grads.const_data_ptr();
    p.channels = x.size(1);
    p.columns = grad.size(1);
    const int64_t width = padded(p.channels), size = p.columns * width;
    const int64_t pixels = x.size(0) * x.size(2) * x.size(3), runs = divide_up(pixels, kPointwiseRun);
    const int64_t tiles = divide_up(p.columns, kPointwiseTile);
    const int64_t fitting = std::max<int64_t>(kShareBytes / (size * static_cast<int64_t>(sizeof(float))), 1);
    const int64_t shares = std::min({divide_up(runs, kLeastRuns), divide_up(kShares, tiles), fitting});
    const at::Tensor sums = at::empty({shares, p.columns, width}, at::kFloat);
    float* const first = sums.mutable_data_ptr<float>();
    const ConvolutionKernels& kernel = kernels_in_use<ConvolutionKernels>();
    at::parallel_for(0, shares * tiles, 1, [&](int64_t begin, int64_t end) {
        const ProductScope scope{p.brgemm};
        const at::Tensor scratch = scratch_of(pointwise_weight_scratch(p.channels));
        for (int64_t item = begin; item < end; ++item) {
            const int64_t share = item / tiles;
            kernel.pointwise_weight(
                p, share * runs / shares * kPointwiseRun, std::min((share + 1) * runs / shares * kPointwiseRun, pixels),
                item % tiles * kPointwiseTile, scratch.mutable_data_ptr<float>(), first + share * size);
        }
    });
    const at::Tensor out = at::empty({p.columns, p.channels, 1, 1}, at::kFloat);
    float* const gradient = out.mutable_data_ptr<float>();
    at::parallel_for(0, p.columns, divide_up(1 << 14, width), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            for (int64_t j = 0; j < p.channels; ++j) {
                double sum = 0;
                for (int64_t share = 0; share < shares; ++share) {
                    sum += first[share * size + i * width + j];
                }
                gradient[i * p.channels + j] = static_cast<float>(sum);
            }
        }
    });
    return out.to(x.scalar_type());
}

at::Tensor depthwise(const at::Tensor& x, const at::Tensor& weight) { return convolve(x, weight, false); }

at::Tensor depthwise_input_gradient(const at::Tensor& grad, const at::Tensor& weight) {
    return convolve(grad, weight, true);
}

at::Tensor depthwise_weight_gradient(const at::Tensor& grad, const at::Tensor& x, int64_t kernel) {
    check_gradient(grad, x);
    check_tensor(grad, "grad", x.sizes(), x);
    const at::Tensor images = channels_last(x), grads = channels_last(grad);
    DepthwiseParams p = depthwise_params(images, kernel);
    p.grad = grads.const_data_ptr();
    const int64_t width = padded(p.channels), size = kernel * kernel * width;
    const int64_t rows = x.size(0) * p.strips * p.height, shares = std::min(rows, kShares);
    const at::Tensor sums = at::zeros({shares, kernel * kernel, width}, at::kDouble);
    double* const first = sums.mutable_data_ptr<double>();
    const ConvolutionKernels& kernels = kernels_in_use<ConvolutionKernels>();
    at::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
        const at::Tensor scratch = scratch_of(p.scratch());
        for (int64_t share = begin; share < end; ++share) {
            kernels.depthwise_weight(p, share * rows / shares, (share + 1) * rows / shares,
                                     scratch.mutable_data_ptr<float>(), first + share * size);
        }
    });
    const at::Tensor gradient = sums.sum(0).narrow(1, 0, p.channels).t().contiguous();
    return gradient.to(x.scalar_type()).view({p.channels, 1, kernel, kernel});
}

}  // namespace ipt_fast::cpu
