// The backward of leffn and leffn_layer: checks, registration; and of the networks that are convolved at once: work
// partition. The arithmetic is in feed_forward_backward_kernel.cpp.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mv.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "feed_forward.h"
#include "feed_forward_backward_kernel.h"
#include "layer_norm_2d.h"
#include "level.h"
#include "matrix_unit.h"
#include "work_space.h"

namespace ipt_fast::cpu {
namespace {

constexpr int64_t kTileRows = 32, kTileColumns = 64;  // most of a tile
constexpr int64_t kChunk = 64;                        // most hidden channels of a chunk
constexpr int64_t kBand = 128;                        // pixels of a band, about: sums over so many are added up in fp32
constexpr int64_t kShares = 64;                       // most sums of the weights' gradients
constexpr int64_t kShareBytes = 32 << 20;             // most bytes of all these sums

// A matrix as contiguous fp32, padded with zeros.
at::Tensor padded_matrix(const at::Tensor& matrix, int64_t rows, int64_t columns) {
    if (matrix.size(0) == rows && matrix.size(1) == columns) {
        return matrix.to(at::kFloat).contiguous();
    }
    at::Tensor out = at::zeros({rows, columns}, at::kFloat);
    out.narrow(0, 0, matrix.size(0)).narrow(1, 0, matrix.size(1)).copy_(matrix);
    return out;
}

// The fewest groups of chunks with which at most an eighth of the threads' time is idle.
int64_t groups(int64_t shares, int64_t chunks, int64_t threads) {
    for (int64_t count = 1; count < chunks; ++count) {
        const int64_t tasks = shares * count, rounds = (tasks + threads - 1) / threads;
        if (8 * (rounds * threads - tasks) <= rounds * threads) {
            return count;
        }
    }
    return chunks;
}

}  // namespace

FeedForwardGradients convolved_gradients(const at::Tensor& grad_, const at::Tensor& x_, const FeedForwardWeights& w,
                                         const OptionalTensor& gate_, const Norm& norm) {
    const at::Tensor x = channels_last(x_), grad = channels_last(grad_), grad_x = empty_channels_last(x.sizes(), x);
    FeedForwardBackwardParams p{};
    p.dtype = dtype_of(x);
    p.brgemm = brgemm_of(p.dtype);
    p.x = x.const_data_ptr();
    p.grad = grad.const_data_ptr();
    p.grad_x = grad_x.mutable_data_ptr();
    p.batch = x.size(0);
    p.channels = x.size(1);
    p.height = x.size(2);
    p.width = x.size(3);
    p.halves = w.form.halves();
    p.hidden = padded(w.hidden());
    p.out_channels = w.project.size(0);
    p.kernel = w.depthwise.size(3);
    p.norm = norm;
    const int64_t channels = padded(p.channels), hidden = p.halves * p.hidden, taps = p.kernel * p.kernel;

    const auto of_halves = [&](const at::Tensor& values) { return padded_halves(wide(values), p.halves); };
    const at::Tensor expand = padded_matrix(of_halves(w.expand.flatten(1)), hidden, channels);
    const at::Tensor project = padded_matrix(w.project.flatten(1), p.out_channels, p.hidden);
    const at::Tensor depthwise = of_halves(w.depthwise.flatten(1)).t().contiguous();
    const at::Tensor flipped = depthwise.flip(0);
    p.expand = expand.const_data_ptr<float>();
    p.project = project.const_data_ptr<float>();
    p.depthwise = depthwise.const_data_ptr<float>();
    p.flipped = flipped.const_data_ptr<float>();

    p.tile_rows = Cut::at_most(p.height, kTileRows);
    p.tile_columns = Cut::at_most(p.width, kTileColumns);
    p.band_rows = std::clamp<int64_t>(kBand / p.tile_columns.largest(), 1, p.tile_rows.largest());
    p.chunks = Cut::at_most(p.hidden / kChannelPad, kChunk / kChannelPad);
    const int64_t weights = expand.numel() + project.numel() + depthwise.numel();
    const int64_t tiles = p.tiles();
    const int64_t most = std::clamp<int64_t>(kShareBytes / (weights * sizeof(float)), 1, kShares);
    p.shares = {tiles, std::min(tiles, most)};
    const int64_t threads = at::get_num_threads();
    p.groups = {p.chunks.count, groups(p.shares.count, p.chunks.count, threads)};

    const at::Tensor grad_expand = at::zeros({p.shares.count, hidden, channels}, at::kFloat);
    const at::Tensor grad_project = at::zeros({p.shares.count, p.out_channels, p.hidden}, at::kFloat);
    const at::Tensor grad_depthwise = at::zeros({p.shares.count, taps, hidden}, at::kFloat);
    p.grad_expand = grad_expand.mutable_data_ptr<float>();
    p.grad_project = grad_project.mutable_data_ptr<float>();
    p.grad_depthwise = grad_depthwise.mutable_data_ptr<float>();

    const int64_t out = padded(p.out_channels);
    at::Tensor expand_bias, depthwise_bias, gate, grad_expand_bias, grad_depthwise_bias, grad_gate, grad_sums;
    if (w.expand_bias.has_value()) {
        expand_bias = of_halves(*w.expand_bias);
        grad_expand_bias = at::zeros({p.shares.count, hidden}, at::kFloat);
        p.expand_bias = expand_bias.const_data_ptr<float>();
        p.grad_expand_bias = grad_expand_bias.mutable_data_ptr<float>();
    }
    const bool ends_convolved = w.form.tail == Tail::convolved;  // and the bias goes on to the output
    if (w.depthwise_bias.has_value() && !ends_convolved) {
        depthwise_bias = of_halves(*w.depthwise_bias);
        grad_depthwise_bias = at::zeros({p.shares.count, hidden}, at::kFloat);
        p.depthwise_bias = depthwise_bias.const_data_ptr<float>();
        p.grad_depthwise_bias = grad_depthwise_bias.mutable_data_ptr<float>();
    }
    if (gate_.has_value()) {
        check_of_images(*gate_, "gate", x);
        gate = padded_parameter(gate_, out);
        grad_gate = at::empty({p.groups.count, tiles, out}, at::kFloat);
        p.gate = gate.const_data_ptr<float>();
        p.gate_stride = stride_of_images(gate);
        p.grad_gate = grad_gate.mutable_data_ptr<float>();
    }
    if ((w.depthwise_bias.has_value() && ends_convolved) || w.project_bias.has_value()) {
        grad_sums = at::empty({tiles, out}, at::kFloat);
        p.grad_sums = grad_sums.mutable_data_ptr<float>();
    }

    at::Tensor partial;
    if (p.groups.count > 1) {
        partial = at::empty({p.groups.count, p.batch, p.height, p.width, p.channels}, at::kFloat);
        p.partial_grad_x = partial.mutable_data_ptr<float>();
    }

    const FeedForwardBackwardScratch layout(p);
    WorkSpace space;
    const int64_t packed_expand = space.add(p.chunks.count * p.halves * p.expand_floats() * sizeof(float));
    const int64_t packed_project = space.add(p.chunks.count * p.project_floats() * sizeof(float));
    const int64_t packed_transposed = space.add(p.chunks.count * p.halves * p.transposed_floats() * sizeof(float));
    const int64_t scratch_size = round_up(layout.size * sizeof(float), 64);
    const int64_t scratch = space.add(threads * scratch_size);
    space.allocate();
    p.packed_expand = space.at<float>(packed_expand);
    p.packed_project = space.at<float>(packed_project);
    p.packed_transposed = space.at<float>(packed_transposed);

    const FeedForwardBackwardKernels& kernel = kernels_in_use<FeedForwardBackwardKernels>();
    at::parallel_for(0, p.chunks.count, 1, [&](int64_t begin, int64_t end) {
        for (int64_t chunk = begin; chunk < end; ++chunk) {
            kernel.pack(p, chunk);
        }
    });
    at::parallel_for(0, p.shares.count * p.groups.count, 1, [&](int64_t begin, int64_t end) {
        const ProductScope scope{p.brgemm};
        float* own = space.at<float>(scratch + at::get_thread_num() * scratch_size);
        for (int64_t task = begin; task < end; ++task) {
            kernel.run(p, task / p.groups.count, task % p.groups.count, own);
        }
    });
    if (p.groups.count > 1) {
        grad_x.copy_(partial.sum(0).permute({0, 3, 1, 2}));
    }
    const auto sum = [](const at::Tensor& shares) { return shares.size(0) == 1 ? shares[0] : shares.sum(0); };
    const auto unpad = [&](const at::Tensor& values) { return unpadded_halves(values, w.hidden(), p.halves); };
    FeedForwardGradients gradients;
    gradients.x = grad_x;
    gradients.expand = unpad(sum(grad_expand)).narrow(1, 0, p.channels).contiguous().view(w.expand.sizes());
    gradients.depthwise = unpad(sum(grad_depthwise).t()).contiguous().view(w.depthwise.sizes());
    gradients.project = sum(grad_project).narrow(1, 0, w.hidden()).contiguous().view(w.project.sizes());
    if (w.expand_bias.has_value()) {
        gradients.expand_bias = unpad(sum(grad_expand_bias));
    }
    if (grad_depthwise_bias.defined()) {
        gradients.depthwise_bias = unpad(sum(grad_depthwise_bias));
    }
    // Sums over tiles, of each image.
    const int64_t of_image = p.tile_rows.count * p.tile_columns.count;
    if (gate_.has_value()) {
        const at::Tensor of_images = grad_gate.view({p.groups.count, p.batch, of_image, out})
                                         .sum(at::IntArrayRef({0, 2}), false, at::kDouble)
                                         .narrow(1, 0, p.out_channels);
        gradients.gate = gate_->dim() == 1 ? of_images.sum(0) : of_images;
    }
    if (grad_sums.defined()) {
        const at::Tensor of_images =
            grad_sums.view({p.batch, of_image, out}).sum(1, false, at::kDouble).narrow(1, 0, p.out_channels);
        add_output_biases(gradients, of_images, w, gate_);
    }
    gradients.gate = gradients.gate.to(at::kFloat);
    return gradients;
}

namespace {

void check_gradient(const at::Tensor& grad, const at::Tensor& x, const FeedForwardWeights& w) {
    w.check(x);
    check_tensor(grad, "grad", {x.size(0), w.project.size(0), x.size(2), x.size(3)}, x);
}

using NetworkGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

NetworkGradients leffn_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& expand_weight,
                                const at::Tensor& depthwise_weight, const at::Tensor& project_weight,
                                const OptionalTensor& expand_bias, const OptionalTensor& depthwise_bias,
                                const OptionalTensor& project_bias) {
    const FeedForwardWeights w{expand_weight, depthwise_weight, project_weight,
                               expand_bias,   depthwise_bias,   project_bias};
    check_gradient(grad, x, w);
    const FeedForwardGradients g = convolved_gradients(grad, x, w, {}, {});
    return {g.x, g.expand, g.depthwise, g.project, g.expand_bias, g.depthwise_bias, g.project_bias};
}

using LayerGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
                                  at::Tensor, at::Tensor, at::Tensor>;

// Of y = x + gate * leffn(layer_norm_2d(x)).
LayerGradients leffn_layer_backward(const at::Tensor& grad_, const at::Tensor& x_, const at::Tensor& norm_weight,
                                    const OptionalTensor& norm_bias, const at::Tensor& expand_weight,
                                    const at::Tensor& depthwise_weight, const at::Tensor& project_weight,
                                    const OptionalTensor& expand_bias, const OptionalTensor& depthwise_bias,
                                    const OptionalTensor& project_bias, const OptionalTensor& gate, double eps,
                                    bool centered) {
    check_gradient(grad_, x_,
                   {expand_weight, depthwise_weight, project_weight, expand_bias, depthwise_bias, project_bias});
    check_tensor(grad_, "grad", x_.sizes(), x_);
    const at::Tensor grad = with_range(grad_), x = with_range(x_);
    const LayerNorm norm(x, wide(norm_weight), wide(norm_bias), eps, centered);
    const FeedForwardWeights w{with_range(expand_weight), with_range(depthwise_weight), with_range(project_weight),
                               wide(expand_bias),         wide(depthwise_bias),         wide(project_bias)};
    const FeedForwardGradients g = convolved_gradients(grad, x, w, wide(gate), norm.params);
    const auto [grad_x, grad_weight, grad_bias] =
        layer_norm_2d_backward(g.x, x, wide(norm_weight), wide(norm_bias), eps, centered);
    grad_x.add_(grad);
    return {grad_x,    grad_weight,   grad_bias,        g.expand,       g.depthwise,
            g.project, g.expand_bias, g.depthwise_bias, g.project_bias, g.gate};
}

}  // namespace

TORCH_LIBRARY_IMPL(ipt_fast_cpu, CPU, m) {
    m.impl("leffn_backward", leffn_backward);
    m.impl("leffn_layer_backward", leffn_layer_backward);
}

}  // namespace ipt_fast::cpu
