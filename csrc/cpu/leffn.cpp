// leffn, leffn_layer and their backwards: checks, work partition, registration. The arithmetic is in leffn_kernel.cpp
// and leffn_backward_kernel.cpp.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <utility>

#include "arguments.h"
#include "layer_norm_2d.h"
#include "leffn_kernel.h"
#include "level.h"
#include "matrix_unit.h"
#include "packed.h"
#include "partition.h"
#include "work_space.h"

namespace ipt_fast::cpu {
namespace {

// expand (M, C, 1, 1), depthwise (M, 1, K, K) with odd K, project (N, M, 1, 1).
void check_weights(const at::Tensor& expand, const at::Tensor& depthwise, const at::Tensor& project) {
    const int64_t channels = input_channels(expand, "expand_weight");
    TORCH_CHECK_VALUE(project.dim() == 4 && project.size(0) > 0, "project_weight must be (N, M, 1, 1); got shape ",
                      project.sizes());
    TORCH_CHECK_VALUE(depthwise.dim() == 4 && depthwise.size(2) % 2 == 1,
                      "depthwise_weight must be (M, 1, K, K) with odd K; got shape ", depthwise.sizes());
    const int64_t hidden = expand.size(0), kernel = depthwise.size(2);
    check_tensor(expand, "expand_weight", {hidden, channels, 1, 1}, expand);
    check_tensor(depthwise, "depthwise_weight", {hidden, 1, kernel, kernel}, expand);
    check_tensor(project, "project_weight", {project.size(0), hidden, 1, 1}, expand);
}

// x (B, C, H, W) and its weights.
void check(const at::Tensor& x, const at::Tensor& expand, const at::Tensor& depthwise, const at::Tensor& project) {
    check_image(x, "x");
    check_weights(expand, depthwise, project);
    check_tensor(expand, "expand_weight", {expand.size(0), x.size(1), 1, 1}, x);
}

// Forward

// What the ring of hidden rows may take of a second cache of 1 MB, unless strips would become so narrow that the
// columns computed twice cost more.
constexpr int64_t kRingBytes = 600 << 10;
constexpr int64_t kStripColumns = 64;
constexpr int64_t kRowsPerStep = 4;
constexpr int64_t kGelu = 16;  // what the activation of a hidden value costs, in multiplications

// The weights as [padded hidden / kChannelPad][kernel * kernel][kChannelPad], fp32, padded with zeros.
at::Tensor packed_depthwise(const at::Tensor& weight) {
    const int64_t hidden = weight.size(0), taps = weight.size(2) * weight.size(3);
    const at::Tensor rows = at::zeros({padded(hidden), taps}, at::kFloat);
    rows.narrow(0, 0, hidden).copy_(weight.reshape({hidden, taps}));
    return rows.view({-1, kChannelPad, taps}).transpose(1, 2).contiguous();
}

// Strips so narrow that the ring fits, or narrower, and bands.
void partition(LeffnParams& p, int64_t batch, int64_t threads) {
    p.rows_per_step = kRowsPerStep;
    const auto ring_bytes = [&] {
        return padded(p.hidden) * p.slots() * (p.strip_width() + 2 * p.radius()) * int64_t(sizeof(float));
    };
    for (p.strips = 1; p.strip_width() > kStripColumns && ring_bytes() > kRingBytes;) {
        ++p.strips;
    }
    const double of_hidden = p.channels + kGelu, of_out = p.kernel * p.kernel + p.out_channels;
    Cheapest<std::pair<int64_t, int64_t>> cheapest;
    for_cuts(padded(p.width) / kChannelPad, p.strips, [&](int64_t strips) {
        p.strips = strips;
        const int64_t columns = std::min(p.strip_width(), p.width), beside = std::min<int64_t>(strips - 1, 2);
        for_cuts(p.height, 1, [&](int64_t bands) {
            const int64_t rows = (p.height + bands - 1) / bands, above = std::min<int64_t>(bands - 1, 2);
            const int64_t hidden = (rows + above * p.radius()) * (columns + beside * p.radius());
            const int64_t share = longest_share(batch * bands * strips, threads);
            cheapest.offer({bands, strips}, share * (hidden * of_hidden + rows * columns * of_out));
        });
    });
    std::tie(p.bands, p.strips) = cheapest.way();
}

struct PackedLeffn : PackedHeader {
    int64_t hidden, out_channels, kernel;
    int64_t expand, project, depthwise;  // pieces
};

// `norm` is nullptr where there is none.
at::Tensor pack(Layer layer, const LayerNorm* norm, const at::Tensor& expand, const at::Tensor& depthwise,
                const at::Tensor& project) {
    const at::Tensor taps = packed_depthwise(depthwise);
    LeffnParams p{};
    p.dtype = dtype_of(expand);
    p.channels = expand.size(1);
    p.hidden = expand.size(0);
    p.out_channels = project.size(0);
    p.expand = weight_of(expand);
    p.project = weight_of(project);
    p.brgemm = brgemm_of(p.dtype);
    Packing<PackedLeffn> packing(layer, expand);
    PackedLeffn& header = packing.header;
    header.hidden = p.hidden;
    header.out_channels = p.out_channels;
    header.kernel = depthwise.size(2);
    header.expand = packing.add(packed_floats(p, p.channels) * static_cast<int64_t>(sizeof(float)));
    header.project = packing.add(packed_floats(p, p.out_channels) * static_cast<int64_t>(sizeof(float)));
    header.depthwise = packing.add(taps);
    if (norm != nullptr) {
        packing.add(*norm);
    }
    packing.allocate();
    packing.fill(header.depthwise, taps);
    if (norm != nullptr) {
        packing.fill(*norm);
    }
    p.packed_expand = packing.at<void>(header.expand);
    p.packed_project = packing.at<void>(header.project);
    const LeffnKernels& kernel = kernels_in_use<LeffnKernels>();
    at::parallel_for(0, p.blocks(), 1, [&](int64_t begin, int64_t end) { kernel.pack(p, begin, end); });
    return packing.block;
}

at::Tensor run(Layer layer, const at::Tensor& x_, const Packed<PackedLeffn>& packed, const Norm& norm) {
    const PackedLeffn& header = packed.header();
    const at::Tensor x = channels_last(x_);
    const int64_t batch = x.size(0);
    at::Tensor out = empty_channels_last({batch, header.out_channels, x.size(2), x.size(3)}, x);
    LeffnParams p{};
    p.dtype = dtype_of(x);
    p.x = x.const_data_ptr();
    p.out = out.mutable_data_ptr();
    p.height = x.size(2);
    p.width = x.size(3);
    p.channels = x.size(1);
    p.hidden = header.hidden;
    p.out_channels = header.out_channels;
    p.kernel = header.kernel;
    p.norm = norm;
    p.residual = layer == Layer::leffn_layer;
    p.depthwise = packed.at<float>(header.depthwise);
    p.packed_expand = packed.at<void>(header.expand);
    p.packed_project = packed.at<void>(header.project);
    p.brgemm = brgemm_of(p.dtype);
    const int64_t threads = at::get_num_threads();
    partition(p, batch, threads);

    const LeffnKernels& kernel = kernels_in_use<LeffnKernels>();
    const int64_t scratch_size = round_up(kernel.scratch_size(p), 64);
    WorkSpace space;
    const int64_t scratch = space.add(threads * scratch_size);
    space.allocate();
    at::parallel_for(0, batch * p.bands * p.strips, 1, [&](int64_t begin, int64_t end) {
        const ProductScope scope{p.brgemm};
        kernel.forward(p, begin, end, space.at<char>(scratch) + at::get_thread_num() * scratch_size);
    });
    return out;
}

at::Tensor pack_leffn(const at::Tensor& expand_weight, const at::Tensor& depthwise_weight,
                      const at::Tensor& project_weight) {
    check_weights(expand_weight, depthwise_weight, project_weight);
    return pack(Layer::leffn, nullptr, expand_weight, depthwise_weight, project_weight);
}

at::Tensor pack_leffn_layer(const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                            const at::Tensor& expand_weight, const at::Tensor& depthwise_weight,
                            const at::Tensor& project_weight, double eps, bool centered) {
    check_weights(expand_weight, depthwise_weight, project_weight);
    const LayerNorm norm(expand_weight, norm_weight, norm_bias, eps, centered);
    TORCH_CHECK_VALUE(project_weight.size(0) == expand_weight.size(1), "project_weight must have the ",
                      expand_weight.size(1), " output channels of x; got ", project_weight.size(0));
    return pack(Layer::leffn_layer, &norm, expand_weight, depthwise_weight, project_weight);
}

at::Tensor leffn_packed(const at::Tensor& x, const at::Tensor& packed) {
    return run(Layer::leffn, x, {packed, Layer::leffn, x}, {});
}

at::Tensor leffn_layer_packed(const at::Tensor& x, const at::Tensor& packed_, const OptionalTensor& norm_weight,
                              const OptionalTensor& norm_bias) {
    const Packed<PackedLeffn> packed(packed_, Layer::leffn_layer, x);
    const LayerNorm norm = norm_of(packed.header(), x, norm_weight, norm_bias);
    return run(Layer::leffn_layer, x, packed, norm.params);
}

at::Tensor leffn(const at::Tensor& x, const at::Tensor& expand_weight, const at::Tensor& depthwise_weight,
                 const at::Tensor& project_weight) {
    check(x, expand_weight, depthwise_weight, project_weight);
    const KeptLevel level;
    return leffn_packed(x, pack_leffn(expand_weight, depthwise_weight, project_weight));
}

at::Tensor leffn_layer(const at::Tensor& x, const at::Tensor& norm_weight, const OptionalTensor& norm_bias,
                       const at::Tensor& expand_weight, const at::Tensor& depthwise_weight,
                       const at::Tensor& project_weight, double eps, bool centered) {
    check(x, expand_weight, depthwise_weight, project_weight);
    const KeptLevel level;
    return leffn_layer_packed(x,
                              pack_leffn_layer({}, {}, expand_weight, depthwise_weight, project_weight, eps, centered),
                              norm_weight, norm_bias);
}

// Backward

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

void check_gradient(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& expand, const at::Tensor& depthwise,
                    const at::Tensor& project) {
    check(x, expand, depthwise, project);
    check_tensor(grad, "grad", {x.size(0), project.size(0), x.size(2), x.size(3)}, x);
}

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// The gradients of norm(x) and of the weights.
Gradients backward(const at::Tensor& grad_, const at::Tensor& x_, const at::Tensor& expand_,
                   const at::Tensor& depthwise_, const at::Tensor& project_, const Norm& norm) {
    const at::Tensor x = channels_last(x_), grad = channels_last(grad_), grad_x = empty_channels_last(x.sizes(), x);
    LeffnBackwardParams p{};
    p.dtype = dtype_of(x);
    p.brgemm = brgemm_of(p.dtype);
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
    const int64_t packed_project = space.add(hidden * padded(p.out_channels) * sizeof(float));
    const int64_t packed_transposed = space.add(hidden * channels * sizeof(float));
    const int64_t scratch_size = round_up(layout.size * sizeof(float), 64);
    const int64_t scratch = space.add(threads * scratch_size);
    space.allocate();
    p.packed_expand = space.at<float>(packed_expand);
    p.packed_project = space.at<float>(packed_project);
    p.packed_transposed = space.at<float>(packed_transposed);

    const LeffnBackwardKernels& kernel = kernels_in_use<LeffnBackwardKernels>();
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
    check_gradient(grad, x, expand, depthwise, project);
    return backward(grad, x, expand, depthwise, project, {});
}

using LayerGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Of y = x + leffn(layer_norm_2d(x)).
LayerGradients leffn_layer_backward(const at::Tensor& grad_, const at::Tensor& x_, const at::Tensor& norm_weight,
                                    const OptionalTensor& norm_bias, const at::Tensor& expand,
                                    const at::Tensor& depthwise, const at::Tensor& project, double eps, bool centered) {
    check_gradient(grad_, x_, expand, depthwise, project);
    check_tensor(grad_, "grad", x_.sizes(), x_);
    const at::Tensor grad = with_range(grad_), x = with_range(x_);
    const LayerNorm norm(x, wide(norm_weight), wide(norm_bias), eps, centered);
    const auto [grad_normed, grad_expand, grad_depthwise, grad_project] =
        backward(grad, x, with_range(expand), with_range(depthwise), with_range(project), norm.params);
    const auto [grad_x, grad_weight, grad_bias] =
        layer_norm_2d_backward(grad_normed, x, wide(norm_weight), wide(norm_bias), eps, centered);
    grad_x.add_(grad);
    return {grad_x, grad_weight, grad_bias, grad_expand, grad_depthwise, grad_project};
}

}  // namespace

// For tests: bands and strips of the forward.
TORCH_LIBRARY_FRAGMENT(ipt_fast_cpu, m) {
    m.def(
        "leffn_partition(int batch, int height, int width, int channels, int hidden, int out_channels, int kernel, int "
        "threads) -> (int, int)",
        [](int64_t batch, int64_t height, int64_t width, int64_t channels, int64_t hidden, int64_t out_channels,
           int64_t kernel, int64_t threads) {
            LeffnParams p{};
            p.height = height;
            p.width = width;
            p.channels = channels;
            p.hidden = hidden;
            p.out_channels = out_channels;
            p.kernel = kernel;
            partition(p, batch, threads);
            return std::tuple(p.bands, p.strips);
        });
}

TORCH_LIBRARY_IMPL(ipt_fast_cpu, CPU, m) {
    m.impl("leffn", leffn);
    m.impl("leffn_layer", leffn_layer);
    m.impl("pack_leffn", pack_leffn);
    m.impl("pack_leffn_layer", pack_leffn_layer);
    m.impl("leffn_packed", leffn_packed);
    m.impl("leffn_layer_packed", leffn_layer_packed);
    m.impl("leffn_backward", leffn_backward);
    m.impl("leffn_layer_backward", leffn_layer_backward);
}

}  // namespace ipt_fast::cpu
