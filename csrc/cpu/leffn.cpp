// leffn and leffn_layer: checks, work partition, registration. The arithmetic is in leffn_kernel.cpp.
#include "leffn.h"

#include <torch/library.h>

#include <algorithm>

#include "layer_norm_2d.h"
#include "leffn_kernel.h"

namespace ipt_fast::cpu {

void check_leffn(const at::Tensor& x, const at::Tensor& expand, const at::Tensor& depthwise,
                 const at::Tensor& project) {
    check_image(x, "x");
    TORCH_CHECK_VALUE(expand.dim() == 4, "expand_weight has ", expand.dim(), " dimensions, expected 4: (M, C, 1, 1)");
    TORCH_CHECK_VALUE(project.dim() == 4, "project_weight has ", project.dim(),
                      " dimensions, expected 4: (N, M, 1, 1)");
    TORCH_CHECK_VALUE(depthwise.dim() == 4 && depthwise.size(2) % 2 == 1, "depthwise_weight has shape ",
                      depthwise.sizes(), ", expected (M, 1, K, K) with odd K");
    const int64_t hidden = expand.size(0), kernel = depthwise.size(2);
    TORCH_CHECK_VALUE(hidden > 0 && project.size(0) > 0, "expand_weight and project_weight have no channels");
    check_tensor(expand, "expand_weight", {hidden, x.size(1), 1, 1}, x);
    check_tensor(depthwise, "depthwise_weight", {hidden, 1, kernel, kernel}, x);
    check_tensor(project, "project_weight", {project.size(0), hidden, 1, 1}, x);
}

namespace {

// What the ring of hidden rows may take of a second cache of 1 MB, unless strips would become so narrow that the
// columns computed twice cost more.
constexpr int64_t kRingBytes = 600 << 10;
constexpr int64_t kStripColumns = 64;
constexpr int64_t kRowsPerStep = 4;

// The weights as [padded hidden / kChannelPad][kernel * kernel][kChannelPad], fp32, padded with zeros.
at::Tensor packed_depthwise(const at::Tensor& weight) {
    const int64_t hidden = weight.size(0), taps = weight.size(2) * weight.size(3);
    const at::Tensor rows = at::zeros({padded(hidden), taps}, at::kFloat);
    rows.narrow(0, 0, hidden).copy_(weight.reshape({hidden, taps}));
    return rows.view({-1, kChannelPad, taps}).transpose(1, 2).contiguous();
}

// Strips so narrow that the ring fits, then the number of bands that is done first by this many threads.
void partition(LeffnParams& p, int64_t batch, int64_t threads) {
    p.rows_per_step = kRowsPerStep;
    const auto ring_bytes = [&] {
        return padded(p.hidden) * p.slots() * (p.strip_width() + 2 * p.radius()) * int64_t(sizeof(float));
    };
    for (p.strips = 1; p.strip_width() > kStripColumns && ring_bytes() > kRingBytes;) {
        ++p.strips;
    }
    const auto rows_of_a_thread = [&](int64_t bands) {
        const int64_t shares = (batch * p.strips * bands + threads - 1) / threads;
        return shares * ((p.height + bands - 1) / bands + (bands > 1 ? p.radius() : 0));
    };
    p.bands = 1;
    for (int64_t bands = 2; bands <= std::min(p.height, 4 * threads); ++bands) {
        if (rows_of_a_thread(bands) < rows_of_a_thread(p.bands)) {
            p.bands = bands;
        }
    }
}

at::Tensor run(const at::Tensor& x_, const Norm& norm, const at::Tensor& expand, const at::Tensor& depthwise,
               const at::Tensor& project, bool residual) {
    const at::Tensor x = channels_last(x_), taps = packed_depthwise(depthwise);
    const int64_t batch = x.size(0), hidden = expand.size(0), out_channels = project.size(0);
    at::Tensor out = empty_channels_last({batch, out_channels, x.size(2), x.size(3)}, x);
    LeffnParams p{};
    p.dtype = dtype_of(x);
    p.x = x.const_data_ptr();
    p.out = out.mutable_data_ptr();
    p.height = x.size(2);
    p.width = x.size(3);
    p.channels = x.size(1);
    p.hidden = hidden;
    p.out_channels = out_channels;
    p.kernel = depthwise.size(2);
    p.norm = norm;
    p.residual = residual;
    p.expand = weight_of(expand);
    p.project = weight_of(project);
    p.depthwise = taps.const_data_ptr<float>();
    p.brgemm = brgemm();
    const int64_t threads = at::get_num_threads();
    partition(p, batch, threads);

    const LeffnKernels& kernel = kernels_in_use<LeffnKernels>();
    const int64_t scratch_size = round_up(kernel.scratch_size(p), 64);
    WorkSpace space;
    const int64_t packed_expand = space.add(packed_floats(p, p.channels) * sizeof(float));
    const int64_t packed_project = space.add(packed_floats(p, p.out_channels) * sizeof(float));
    const int64_t scratch = space.add(threads * scratch_size);
    space.allocate();
    p.packed_expand = space.at<void>(packed_expand);
    p.packed_project = space.at<void>(packed_project);
    at::parallel_for(0, p.blocks(), 1, [&](int64_t begin, int64_t end) { kernel.pack(p, begin, end); });
    at::parallel_for(0, batch * p.bands * p.strips, 1, [&](int64_t begin, int64_t end) {
        const BrgemmScope scope{p.brgemm};
        kernel.forward(p, begin, end, space.at<char>(scratch) + at::get_thread_num() * scratch_size);
    });
    return out;
}

at::Tensor leffn(const at::Tensor& x, const at::Tensor& expand_weight, const at::Tensor& depthwise_weight,
                 const at::Tensor& project_weight) {
    check_leffn(x, expand_weight, depthwise_weight, project_weight);
    return run(x, Norm{}, expand_weight, depthwise_weight, project_weight, false);
}

at::Tensor leffn_layer(const at::Tensor& x, const at::Tensor& norm_weight, const OptionalTensor& norm_bias,
                       const at::Tensor& expand_weight, const at::Tensor& depthwise_weight,
                       const at::Tensor& project_weight, double eps, bool centered) {
    check_leffn(x, expand_weight, depthwise_weight, project_weight);
    const LayerNorm norm(x, norm_weight, norm_bias, eps, centered);
    TORCH_CHECK_VALUE(project_weight.size(0) == x.size(1), "project_weight has ", project_weight.size(0),
                      " output channels, expected those of x, ", x.size(1));
    return run(x, norm.params, expand_weight, depthwise_weight, project_weight, true);
}

}  // namespace

TORCH_LIBRARY_IMPL(ipt_fast_cpu, CPU, m) {
    m.impl("leffn", leffn);
    m.impl("leffn_layer", leffn_layer);
}

}  // namespace ipt_fast::cpu
