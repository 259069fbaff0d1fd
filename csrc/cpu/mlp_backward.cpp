// The backward of a feed-forward network without a convolution: work partition. The arithmetic is in
// mlp_backward_kernel.cpp.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "feed_forward.h"
#include "level.h"
#include "matrix_unit.h"
#include "mlp_backward_kernel.h"
#include "work_space.h"

namespace ipt_fast::cpu {
namespace {

// Most sums of the weights' gradients, unless there are more images or threads; runs of a share at least; most bytes of
// all these sums.
constexpr int64_t kShares = 64;
constexpr int64_t kLeastRuns = 8;
constexpr int64_t kShareBytes = 32 << 20;

}  // namespace

FeedForwardGradients mlp_gradients(const at::Tensor& grad_, const at::Tensor& x_, const FeedForwardWeights& w,
                                   const OptionalTensor& gate, const Norm& norm) {
    const at::Tensor x = channels_last(x_), grad = channels_last(grad_), grad_x = empty_channels_last(x.sizes(), x);
    const int64_t batch = x.size(0);
    MlpBackwardParams p{};
    p.dtype = dtype_of(x);
    p.brgemm = brgemm_of(p.dtype);
    p.x = x.const_data_ptr();
    p.grad = grad.const_data_ptr();
    p.grad_x = grad_x.mutable_data_ptr();
    p.pixels = x.size(2) * x.size(3);
    p.channels = x.size(1);
    p.hidden = w.expand.size(0);
    p.out_channels = w.project.size(0);
    p.norm = norm;
    const int64_t channels = padded(p.channels), hidden = padded(p.hidden), out = padded(p.out_channels);
    const int64_t bytes = (hidden * channels + p.out_channels * hidden) * static_cast<int64_t>(sizeof(float));
    const int64_t images = std::max<int64_t>(batch, 1), runs = (p.pixels + kMlpRun - 1) / kMlpRun;
    const int64_t most = std::min(kShares, kShareBytes / bytes) / images, threads = at::get_num_threads();
    const int64_t wanted = std::max(runs / kLeastRuns, (threads + images - 1) / images);
    p.shares = std::clamp<int64_t>(std::min(wanted, most), 1, runs);

    const at::Tensor expand_bias = padded_parameter(w.expand_bias, hidden);
    p.expand_bias = expand_bias.const_data_ptr<float>();
    const at::Tensor expand = wide(w.expand).flatten(1), project = wide(w.project).flatten(1);
    const bool gate_of_images = gate.has_value() && gate->dim() == 2;
    // (N, M), or (B, N, M) of each image.
    const at::Tensor gated = gate.has_value() ? project.mul(gate->unsqueeze(-1)) : project;

    const auto zeros = [&](at::IntArrayRef shape) { return at::zeros(shape, at::kFloat); };
    const at::Tensor grad_expand = zeros({batch * p.shares, hidden, channels});
    const at::Tensor grad_project = zeros({batch, p.shares, p.out_channels, hidden});
    const at::Tensor grad_expand_bias = zeros({batch * p.shares, hidden}), grad_sums = zeros({batch, p.shares, out});
    p.grad_expand = grad_expand.mutable_data_ptr<float>();
    p.grad_project = grad_project.mutable_data_ptr<float>();
    p.grad_expand_bias = grad_expand_bias.mutable_data_ptr<float>();
    p.grad_sums = grad_sums.mutable_data_ptr<float>();

    const MlpBackwardKernels& kernel = kernels_in_use<MlpBackwardKernels>();
    const auto packed_size = [&](int64_t columns, int64_t depth) {
        return round_up(kernel.packed_size(p.dtype, p.brgemm, columns, depth), 64);
    };
    const int64_t project_size = packed_size(p.hidden, p.out_channels);
    const int64_t scratch_size = round_up(kernel.scratch_size(p) * static_cast<int64_t>(sizeof(float)), 64);
    WorkSpace space;
    const int64_t packed_expand = space.add(packed_size(p.hidden, p.channels));
    const int64_t packed_transposed = space.add(packed_size(p.channels, p.hidden));
    const int64_t packed_project = space.add(project_size * (gate_of_images ? batch : 1));
    const int64_t scratch = space.add(at::get_num_threads() * scratch_size);
    space.allocate();
    const auto pack = [&](const Weight& weight, int64_t offset) {
        kernel.pack(p.dtype, p.brgemm, weight, space.at<void>(offset));
    };
    pack(weight_of(expand), packed_expand);
    pack(transposed(weight_of(expand)), packed_transposed);
    for (int64_t i = 0; i < (gate_of_images ? batch : 1); ++i) {
        const at::Tensor of_image = gate_of_images ? gated.select(0, i) : gated;
        pack(transposed(weight_of(of_image)), packed_project + i * project_size);
    }
    p.packed_expand = space.at<void>(packed_expand);
    p.packed_transposed = space.at<void>(packed_transposed);
    p.packed_project = space.at<void>(packed_project);
    p.project_stride = gate_of_images ? project_size : 0;
    at::parallel_for(0, batch * p.shares, 1, [&](int64_t begin, int64_t end) {
        const ProductScope scope{p.brgemm};
        float* const own = space.at<float>(scratch + at::get_thread_num() * scratch_size);
        for (int64_t k = begin; k < end; ++k) {
            kernel.run(p, k / p.shares, k % p.shares, own);
        }
    });

    FeedForwardGradients gradients;
    gradients.x = grad_x;
    const at::Tensor of_expand = grad_expand.sum(0).narrow(0, 0, p.hidden).narrow(1, 0, p.channels);
    gradients.expand = of_expand.contiguous().view(w.expand.sizes());
    if (w.expand_bias.has_value()) {
        gradients.expand_bias = grad_expand_bias.sum(0).narrow(0, 0, p.hidden);
    }
    at::Tensor of_images = grad_project.sum(1).narrow(2, 0, p.hidden);
    if (gate.has_value()) {
        const at::Tensor of_gates = of_images.mul(project).sum(-1, false, at::kDouble);
        gradients.gate = gate_of_images ? of_gates : of_gates.sum(0);
        of_images = of_images.mul(gate->unsqueeze(-1));
    }
    gradients.project = of_images.sum(0).contiguous().view(w.project.sizes());
    add_output_biases(gradients, grad_sums.sum(1, false, at::kDouble).narrow(1, 0, p.out_channels), w, gate);
    gradients.gate = gradients.gate.to(at::kFloat);
    return gradients;
}

}  // namespace ipt_fast::cpu
