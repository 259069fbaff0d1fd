// The backward of leffn and of its layer: checks, work partition, registration. The arithmetic is in
// leffn_backward_kernel.cpp.
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "layer_norm_2d.h"
#include "leffn.h"
#include "leffn_backward_kernel.h"

namespace ipt_fast::cpu {
namespace {

constexpr int64_t kTileRows = 32, kTileColumns = 64;  // most of a tile
constexpr int64_t kChunk = 64;                        // most hidden channels of a chunk
constexpr int64_t kBand = 128;                        // pixels of a band, about: sums over so many are added up in fp32
constexpr int64_t kShares = 64;  // most sums of the weights' gradients, and most bytes of all of them:
constexpr int64_t kShareBytes = 32 << 20;

void check(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& expand, const at::Tensor& depthwise,
           const at::Tensor& project) {
    check_leffn(x, expand, depthwise, project);
    check_tensor(grad, "grad", {x.size(0), project.size(0), x.size(2), x.size(3)}, x);
}

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

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// The gradients of norm(x) and of the weights.
Gradients backward(const at::Tensor& grad_, const at::Tensor& x_, const at::Tensor& expand_,
                   const at::Tensor& depthwise_, const at::Tensor& project_, const Norm& norm) {
    const at::Tensor x = channels_last(x_), grad = channels_last(grad_), grad_x = empty_channels_last(x.sizes(), x);
    LeffnBackwardParams p{};
    p.dtype = dtype_of(x);
    p.x = x.const_data_ptr();
    p.grad = grad.const_data_ptr();
    p.grad_x = grad_x.mutable_data_ptr();
    p.batch = x.size(0);
    p.channels = x.size(1);
    p.height = x.size(2);
    p.width = x.size(3);
    p.hidden = expand_.size(0);
    p.out_channels = project_.size(0);
    p.kernel = depthwise_.size(3);
    p.norm = norm;
    const int64_t channels = padded(p.channels), hidden = padded(p.hidden), taps = p.kernel * p.kernel;

    const at::Tensor expand = padded_matrix(expand_.flatten(1), hidden, channels);
    const at::Tensor project = padded_matrix(project_.flatten(1), p.out_channels, hidden);
    const at::Tensor depthwise = padded_matrix(depthwise_.flatten(1).t(), taps, hidden);
    const at::Tensor flipped = depthwise.flip(0);
    p.expand = expand.const_data_ptr<float>();
    p.project = project.const_data_ptr<float>();
    p.depthwise = depthwise.const_data_ptr<float>();
    p.flipped = flipped.const_data_ptr<float>();

    p.tile_rows = Cut::at_most(p.height, kTileRows);
    p.tile_columns = Cut::at_most(p.width, kTileColumns);
    p.band_rows = std::clamp<int64_t>(kBand / p.tile_columns.largest(), 1, p.tile_rows.largest());
    p.chunks = Cut::at_most(hidden / kChannelPad, kChunk / kChannelPad);
    const int64_t weights = expand.numel() + project.numel() + depthwise.numel();
    const int64_t tiles = p.batch * p.tile_rows.count * p.tile_columns.count;
    const int64_t most = std::clamp<int64_t>(kShareBytes / (weights * sizeof(float)), 1, kShares);
    p.shares = {tiles, std::min(tiles, most)};
    const int64_t threads = at::get_num_threads();
    p.groups = {p.chunks.count, groups(p.shares.count, p.chunks.count, threads)};

    const at::Tensor grad_expand = at::zeros({p.shares.count, hidden, channels}, at::kFloat);
    const at::Tensor grad_project = at::zeros({p.shares.count, p.out_channels, hidden}, at::kFloat);
    const at::Tensor grad_depthwise = at::zeros({p.shares.count, taps, hidden}, at::kFloat);
    p.grad_expand = grad_expand.mutable_data_ptr<float>();
    p.grad_project = grad_project.mutable_data_ptr<float>();
    p.grad_depthwise = grad_depthwise.mutable_data_ptr<float>();

    at::Tensor partial;
    if (p.groups.count > 1) {
        partial = at::empty({p.groups.count, p.batch, p.height, p.width, p.channels}, at::kFloat);
        p.partial_grad_x = partial.mutable_data_ptr<float>();
    }

    const LeffnBackwardScratch layout(p);
    WorkSpace space;
    const int64_t packed_expand = space.add(hidden * channels * sizeof(float));
    const int64_t packed_project = space.add(hidden * p.out_channels * sizeof(float));
    const int64_t scratch_size = round_up(layout.size * sizeof(float), 64);
    const int64_t scratch = space.add(threads * scratch_size);
    space.allocate();
    p.packed_expand = space.at<float>(packed_expand);
    p.packed_project = space.at<float>(packed_project);

    const LeffnBackwardKernels& kernel = kernels_in_use<LeffnBackwardKernels>();
    at::parallel_for(0, p.chunks.count, 1, [&](int64_t begin, int64_t end) {
        for (int64_t chunk = begin; chunk < end; ++chunk) {
            kernel.pack(p, chunk);
        }
    });
    at::parallel_for(0, p.shares.count * p.groups.count, 1, [&](int64_t begin, int64_t end) {
        float* own = space.at<float>(scratch + at::get_thread_num() * scratch_size);
        for (int64_t task = begin; task < end; ++task) {
            kernel.run(p, task / p.groups.count, task % p.groups.count, own);
        }
    });
    if (p.groups.count > 1) {
        grad_x.copy_(partial.sum(0).permute({0, 3, 1, 2}));
    }
    const auto gradient = [](const at::Tensor& shares, const at::Tensor& weight, bool transposed) {
        const at::Tensor sum = shares.size(0) == 1 ? shares.select(0, 0) : shares.sum(0);
        const at::Tensor matrix = (transposed ? sum.t() : sum).narrow(0, 0, weight.size(0));
        return matrix.narrow(1, 0, weight.numel() / weight.size(0))
            .to(weight.scalar_type())
            .contiguous()
            .view(weight.sizes());
    };
    return {grad_x, gradient(grad_expand, expand_, false), gradient(grad_depthwise, depthwise_, true),
            gradient(grad_project, project_, false)};
}

Gradients leffn_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& expand,
                         const at::Tensor& depthwise, const at::Tensor& project) {
    check(grad, x, expand, depthwise, project);
    return backward(grad, x, expand, depthwise, project, {});
}

using LayerGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Of y = x + leffn(layer_norm_2d(x)).
LayerGradients leffn_layer_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& norm_weight,
                                    const OptionalTensor& norm_bias, const at::Tensor& expand,
                                    const at::Tensor& depthwise, const at::Tensor& project, double eps, bool centered) {
    check(grad, x, expand, depthwise, project);
    TORCH_CHECK_VALUE(grad.sizes() == x.sizes(), "grad has shape ", grad.sizes(), ", expected that of x, ", x.sizes());
    const LayerNorm norm(x, norm_weight, norm_bias, eps, centered);
    const auto [grad_normed, grad_expand, grad_depthwise, grad_project] =
        backward(grad, x, expand, depthwise, project, norm.params);
    const auto [grad_x, grad_weight, grad_bias] =
        layer_norm_2d_backward(grad_normed, x, norm_weight, norm_bias, eps, centered);
    grad_x.add_(grad);
    return {grad_x, grad_weight, grad_bias, grad_expand, grad_depthwise, grad_project};
}

}  // namespace

TORCH_LIBRARY_IMPL(ipt_fast_cpu, CPU, m) {
    m.impl("leffn_backward", leffn_backward);
    m.impl("leffn_layer_backward", leffn_layer_backward);
}

}  // namespace ipt_fast::cpu
