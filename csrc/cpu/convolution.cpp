// Pointwise and depthwise convolutions and their gradients: checks, work partition.
#include "convolution.h"

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
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
// Pixels of a pointwise convolution's block: a multiple of the rows of all units' tiles, of half as many where the
// products would not fit.
constexpr int64_t kPointwiseBlock = 96;
// A block's products, or the rows of a strip under a depthwise kernel, have this much of the second cache.
constexpr int64_t kCacheFloats = 64 << 10;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

at::Tensor scratch_of(int64_t floats) { return at::empty({floats}, at::kFloat); }

void check_gradient(const at::Tensor& grad, const at::Tensor& x) {
    check_image(x, "x");
    check_tensor(grad, "grad", {x.size(0), grad.dim() == 4 ? grad.size(1) : 0, x.size(2), x.size(3)}, x);
}

// A small parameter as kernels read it, and its values; nullptr where there is none.
struct Parameter {
    Parameter(const OptionalTensor& parameter, int64_t size) {
        if (parameter.has_value()) {
            values = padded_parameter(parameter, padded(size));
            data = values.const_data_ptr<float>();
        }
    }

    at::Tensor values;
    const float* data = nullptr;
};

// What is done to the pixels in front of a pointwise convolution, and to its sums behind it.
struct Surroundings {
    OptionalTensor gate = {};
    Norm norm = {};
    bool activated = false;
    OptionalTensor residual = {};
};

at::Tensor multiply(const at::Tensor& map, const Weight& weight, const OptionalTensor& bias_,
                    const Surroundings& around) {
    const at::Tensor x = with_pixels(map);
    const at::Tensor out = empty_channels_last({x.size(0), weight.columns, x.size(2), x.size(3)}, x);
    const at::Tensor residual = around.residual.has_value() ? channels_last(*around.residual) : at::Tensor();
    const Parameter bias(bias_, weight.columns), gate(around.gate, weight.depth);
    const ConvolutionKernels& kernel = kernels_in_use<ConvolutionKernels>();
    PointwiseParams p{};
    p.dtype = dtype_of(x);
    p.brgemm = brgemm_of(p.dtype);
    p.x = pixels_of(x);
    p.image_pixels = x.size(2) * x.size(3);
    p.pixels = x.size(0) * p.image_pixels;
    p.channels = weight.depth;
    p.columns = weight.columns;
    p.block = kPointwiseBlock * padded(p.columns) > kCacheFloats ? kPointwiseBlock / 2 : kPointwiseBlock;
    p.norm = around.norm;
    p.gate = gate.data;
    p.gate_stride = around.gate.has_value() ? stride_of_images(gate.values) : 0;
    p.bias = bias.data;
    p.activated = around.activated;
    p.residual = residual.defined() ? residual.const_data_ptr() : nullptr;
    p.out = out.mutable_data_ptr();
    WorkSpace work;
    const int64_t packed = work.add(kernel.packed_size(p.dtype, p.brgemm, p.columns, p.channels));
    const int64_t scratch = work.add(at::get_num_threads() * p.scratch() * static_cast<int64_t>(sizeof(float)));
    work.allocate();
    kernel.pack(p.dtype, p.brgemm, weight, work.at<void>(packed));
    p.packed = work.at<void>(packed);
    at::parallel_for(0, divide_up(p.pixels, p.block), 1, [&](int64_t begin, int64_t end) {
        const ProductScope scope{p.brgemm};
        kernel.pointwise(p, begin, end, work.at<float>(scratch) + at::get_thread_num() * p.scratch());
    });
    return out;
}

// A pointwise weight's gradient (columns, row) and its bias's, summed up in a fixed number of shares, at most `most`:
// sum(share, shares, first row, rows, scratch, sums) computes a share's sums of a tile of rows.
template <typename Sum>
at::Tensor sum_tiles(const PointwiseWeightParams& p, int64_t most, const Sum& sum_of) {
    const int64_t row = p.row(), size = p.columns * row, tiles = divide_up(p.columns, kPointwiseTile);
    const int64_t fitting = std::max<int64_t>(kShareBytes / (size * static_cast<int64_t>(sizeof(float))), 1);
    const int64_t shares = std::min({most, divide_up(kShares, tiles), fitting});
    const at::Tensor sums = at::empty({shares, p.columns, row}, at::kFloat);
    float* const first = sums.mutable_data_ptr<float>();
    at::parallel_for(0, shares * tiles, 1, [&](int64_t begin, int64_t end) {
        const ProductScope scope{p.brgemm};
        const at::Tensor scratch = scratch_of(p.scratch());
        for (int64_t item = begin; item < end; ++item) {
            const int64_t share = item / tiles, first_row = item % tiles * kPointwiseTile;
            sum_of(share, shares, first_row, std::min(kPointwiseTile, p.columns - first_row),
                   scratch.mutable_data_ptr<float>(), first + share * size + first_row * row);
        }
    });
    const at::Tensor out = at::empty({p.columns, row}, at::kFloat);
    float* const gradient = out.mutable_data_ptr<float>();
    at::parallel_for(0, p.columns, divide_up(1 << 14, row), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin * row; i < end * row; ++i) {
            double sum = 0;
            for (int64_t share = 0; share < shares; ++share) {
                sum += first[share * size + i];
            }
            gradient[i] = static_cast<float>(sum);
        }
    });
    return out;
}

// Pixels are cut into `parts` parts of whole runs: where part `index` begins.
int64_t first_of_part(int64_t index, int64_t parts, int64_t pixels) {
    return std::min(index * divide_up(pixels, kPointwiseRun) / parts * kPointwiseRun, pixels);
}

at::Tensor empty_gradient() { return at::empty({0}, at::kFloat); }

DepthwiseParams depthwise_params(const at::Tensor& x, int64_t kernel) {
    DepthwiseParams p{};
    p.dtype = dtype_of(x);
    p.kernel = kernel;
    p.x = pixels_of(x);
    p.channels = x.size(1);
    p.height = x.size(2);
    p.width = x.size(3);
    const int64_t fitting = kCacheFloats / (padded(p.channels) * kernel) - (kernel - 1);
    p.strips = divide_up(p.width, std::max<int64_t>(fitting, 16));
    return p;
}

// The weight (channels, 1, k, k) as [tap][padded channels], `flipped` by the centre for the gradient of the input.
at::Tensor taps_of(const at::Tensor& weight, bool flipped) {
    const at::Tensor taps = weight.flatten(1).t();
    return padded_parameter(flipped ? taps.flip(0) : taps, padded(weight.size(0)));
}

at::Tensor convolve(const at::Tensor& map, const at::Tensor& weight, const OptionalTensor& bias_, const Norm& norm,
                    bool activated, bool flipped) {
    check_image(map, "x");
    const int64_t kernel = weight.dim() == 4 ? weight.size(3) : 0;
    TORCH_CHECK_VALUE(kernel % 2 == 1, "weight must be (C, 1, K, K) with odd K; got shape ", weight.sizes());
    check_tensor(weight, "weight", {map.size(1), 1, kernel, kernel}, map);
    const at::Tensor x = with_pixels(map), out = empty_channels_last(x.sizes(), x), taps = taps_of(weight, flipped);
    const Parameter bias(bias_, map.size(1));
    DepthwiseParams p = depthwise_params(x, kernel);
    p.norm = norm;
    p.weight = taps.const_data_ptr<float>();
    p.bias = bias.data;
    p.activated = activated;
    p.out = out.mutable_data_ptr();
    const ConvolutionKernels& kernels = kernels_in_use<ConvolutionKernels>();
    at::parallel_for(0, x.size(0) * p.strips * p.height, 4, [&](int64_t begin, int64_t end) {
        kernels.depthwise(p, begin, end, scratch_of(p.scratch()).mutable_data_ptr<float>());
    });
    return out;
}

}  // namespace

at::Tensor pointwise(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias, const Norm& norm,
                     bool activated, const OptionalTensor& residual) {
    check_image(x, "x");
    check_tensor(weight, "weight", {weight.dim() == 4 ? weight.size(0) : 0, x.size(1), 1, 1}, x);
    return multiply(x, weight_of(weight), bias, {.norm = norm, .activated = activated, .residual = residual});
}

at::Tensor pointwise_input_gradient(const at::Tensor& grad, const at::Tensor& weight, const OptionalTensor& gate) {
    check_image(grad, "grad");
    check_tensor(weight, "weight", {grad.size(1), weight.dim() == 4 ? weight.size(1) : 0, 1, 1}, grad);
    return multiply(grad, transposed(weight_of(weight)), {}, {.gate = gate});
}

ParameterGradients pointwise_gradients(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight_,
                                       const OptionalTensor& bias, const OptionalTensor& gate_) {
    check_gradient(grad, x);
    const at::Tensor images = channels_last(x), grads = channels_last(grad);
    PointwiseWeightParams p{};
    p.dtype = dtype_of(x);
    p.brgemm = brgemm_of(p.dtype);
    p.x = images.const_data_ptr();
    p.grad = grads.const_data_ptr();
    p.channels = x.size(1);
    p.columns = grad.size(1);
    p.bias = bias.has_value();
    const ConvolutionKernels& kernel = kernels_in_use<ConvolutionKernels>();
    const int64_t image_pixels = x.size(2) * x.size(3), all = x.size(0) * image_pixels, width = padded(p.channels);
    const auto least_parts = [](int64_t pixels) { return divide_up(divide_up(pixels, kPointwiseRun), kLeastRuns); };
    at::Tensor sums, grad_gate = empty_gradient();
    if (!gate_.has_value()) {
        sums = sum_tiles(p, least_parts(all), [&](int64_t share, int64_t shares, int64_t first_row, auto... rest) {
            kernel.pointwise_weight(p, first_of_part(share, shares, all), first_of_part(share + 1, shares, all),
                                    first_row, rest...);
        });
    } else {
        // Images of one gate are cut into parts. A part's sums are taken without the gate, whose gradient they give.
        const at::Tensor gate = padded_parameter(gate_, padded(p.columns)), weight = at::zeros({p.columns, p.row()});
        weight.narrow(1, 0, p.channels).copy_(weight_.flatten(1));
        if (bias.has_value()) {
            weight.select(1, width).copy_(*bias);
        }
        const int64_t groups = gate.dim() == 2 ? x.size(0) : 1, pixels = gate.dim() == 2 ? image_pixels : all;
        const int64_t parts = std::min(least_parts(pixels), divide_up(kShares, std::max<int64_t>(groups, 1)));
        const at::Tensor of_parts = at::zeros({groups, parts, p.columns}, at::kFloat);
        const float *const gates = gate.const_data_ptr<float>(), *const weights = weight.const_data_ptr<float>();
        float* const of_part = of_parts.mutable_data_ptr<float>();
        sums = sum_tiles(
            p, groups * parts,
            [&](int64_t share, int64_t shares, int64_t first_row, int64_t rows, float* scratch, float* total) {
                const at::Tensor tile = scratch_of(rows * p.row());
                float* const values = tile.mutable_data_ptr<float>();
                const int64_t last = (share + 1) * groups * parts / shares;
                std::fill_n(total, rows * p.row(), 0.0f);
                for (int64_t i = share * groups * parts / shares; i < last; ++i) {
                    const int64_t group = i / parts, part = i % parts, first = group * pixels;
                    kernel.pointwise_weight(p, first + first_of_part(part, parts, pixels),
                                            first + first_of_part(part + 1, parts, pixels), first_row, rows, scratch,
                                            values);
                    kernel.gate_sums({values, rows, p.row(), p.row()}, weights + first_row * p.row(),
                                     gates + group * stride_of_images(gate) + first_row, total,
                                     of_part + i * p.columns + first_row);
                }
            });
        grad_gate = of_parts.sum(1, false, at::kDouble).to(at::kFloat).view(gate_->sizes());
    }
    return {sums.narrow(1, 0, p.channels).contiguous().view({p.columns, p.channels, 1, 1}),
            bias.has_value() ? sums.select(1, width).clone() : empty_gradient(), grad_gate};
}

at::Tensor depthwise(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias, const Norm& norm,
                     bool activated) {
    return convolve(x, weight, bias, norm, activated, false);
}

at::Tensor depthwise_input_gradient(const at::Tensor& grad, const at::Tensor& weight) {
    return convolve(grad, weight, {}, {}, false, true);
}

ParameterGradients depthwise_gradients(const at::Tensor& grad, const at::Tensor& x, int64_t kernel,
                                       const OptionalTensor& bias) {
    check_gradient(grad, x);
    check_tensor(grad, "grad", x.sizes(), x);
    const at::Tensor images = channels_last(x), grads = channels_last(grad);
    DepthwiseParams p = depthwise_params(images, kernel);
    p.grad = pixels_of(grads);
    p.bias_gradient = bias.has_value();
    const int64_t width = padded(p.channels), taps = kernel * kernel, size = (taps + 1) * width;
    const int64_t rows = x.size(0) * p.strips * p.height, shares = std::min(rows, kShares);
    const at::Tensor sums = at::zeros({shares, taps + 1, width}, at::kDouble);
    double* const first = sums.mutable_data_ptr<double>();
    const ConvolutionKernels& kernels = kernels_in_use<ConvolutionKernels>();
    at::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
        const at::Tensor scratch = scratch_of(p.scratch());
        for (int64_t share = begin; share < end; ++share) {
            kernels.depthwise_weight(p, share * rows / shares, (share + 1) * rows / shares,
                                     scratch.mutable_data_ptr<float>(), first + share * size);
        }
    });
    const at::Tensor gradients = sums.sum(0).narrow(1, 0, p.channels).to(at::kFloat);
    return {gradients.narrow(0, 0, taps).t().contiguous().view({p.channels, 1, kernel, kernel}),
            bias.has_value() ? gradients[taps].clone() : empty_gradient(), empty_gradient()};
}

}  // namespace ipt_fast::cpu
