// What layers of channel attention share: packing, work partition, the passes over a map, the backward. The arithmetic
// is in channel_attention_layer_kernel.cpp.
#include "channel_layers.h"

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <tuple>
#include <utility>

#include "channel_attention.h"
#include "convolution.h"
#include "matrix_unit.h"
#include "partition.h"
#include "work_space.h"

namespace ipt_fast::cpu {
namespace {

// What the norm of a value costs, in multiplications.
constexpr int64_t kNorm = 8;

}  // namespace

LayerConvolutions::LayerConvolutions(const at::Tensor& qkv_weight, const OptionalTensor& depthwise_weight,
                                     const at::Tensor& project_weight, const OptionalTensor& qkv_bias,
                                     const OptionalTensor& depthwise_bias, const OptionalTensor& project_bias,
                                     int64_t num_heads) {
    const int64_t channels = input_channels(qkv_weight, "qkv_weight"), heads = num_heads;
    check_heads(channels, num_heads, "x");
    check_tensor(qkv_weight, "qkv_weight", {3 * channels, channels, 1, 1}, qkv_weight);
    check_tensor(project_weight, "project_weight", {channels, channels, 1, 1}, qkv_weight);
    const auto check_bias = [&](const OptionalTensor& bias, const char* name, int64_t size) {
        if (bias.has_value()) {
            check_tensor(*bias, name, {size}, qkv_weight, true);
        }
    };
    check_bias(qkv_bias, "qkv_bias", 3 * channels);
    check_bias(depthwise_bias, "depthwise_bias", 3 * channels);
    check_bias(project_bias, "project_bias", channels);

    Groups& g = params.groups;
    g.heads = num_heads;
    g.head_channels = channels / num_heads;
    g.depth = padded(g.head_channels);
    params.dtype = dtype_of(qkv_weight);
    params.brgemm = brgemm_of(params.dtype);
    params.qkv = weight_of(qkv_weight);
    params.project = weight_of(project_weight);
    params.halo = depthwise_weight.has_value() ? 1 : 0;

    const auto of_heads = [&](const at::Tensor& values) {  // (3 * channels, ...) -> (heads, ..., 3, head_channels)
        return values.reshape({3, heads, g.head_channels, -1}).permute({1, 3, 0, 2});
    };
    taps = at::zeros({heads, params.taps() + 1, 3, g.depth}, at::kFloat);
    const at::Tensor values = taps.narrow(3, 0, g.head_channels), start = values.narrow(1, params.taps(), 1);
    if (depthwise_bias.has_value()) {
        start.copy_(of_heads(*depthwise_bias));
    }
    if (depthwise_weight.has_value()) {
        check_tensor(*depthwise_weight, "depthwise_weight", {3 * channels, 1, 3, 3}, qkv_weight);
        values.narrow(1, 0, params.taps()).copy_(of_heads(*depthwise_weight));
    }
    if (qkv_bias.has_value() && depthwise_weight.has_value()) {
        start.add_(of_heads(depthwise_weight->flatten(1).to(at::kDouble).sum(1) * *qkv_bias));
        outside = padded_parameter(of_heads(-*qkv_bias), g.depth);
    } else if (qkv_bias.has_value()) {
        start.copy_(of_heads(*qkv_bias));
    }
}

void LayerConvolutions::pack() const {
    const auto& kernel = kernels_in_use<ChannelAttentionLayerKernels>();
    at::parallel_for(0, 3 * params.groups.heads + 1, 1,
                     [&](int64_t begin, int64_t end) { kernel.pack(params, begin, end); });
}

// Pass 1: as many heads at once as fit the ring in strips of some width (their norm is computed for each group of
// heads), or fewer; strips as wide as fits, or narrower. Pass 2: shares of a block.
void partition(ChannelAttentionLayerParams& p, int64_t threads) {
    constexpr int64_t kLeastColumns = 32;
    const Groups& g = p.groups;
    const int64_t column = kRingRows * 3 * g.depth * static_cast<int64_t>(sizeof(float));  // of one head
    const int64_t narrow = std::min(kLeastColumns, g.width) + 2;
    const int64_t fitting = std::clamp<int64_t>(kRingBytes / (column * narrow), 1, g.heads);
    const int64_t down = p.vertical.blocks(), across = p.horizontal.blocks();
    const WindowBlock first(p.vertical, p.horizontal, 0);  // others are about as large
    Cheapest<std::pair<int64_t, int64_t>> cheapest;
    for_cuts(g.heads, (g.heads + fitting - 1) / fitting, [&](int64_t head_groups) {
        const int64_t heads = (g.heads + head_groups - 1) / head_groups;
        const int64_t widest = std::max<int64_t>(kRingBytes / (column * heads) - 2, 1);
        for_cuts(across, std::min((g.width + widest - 1) / widest, across), [&](int64_t strips) {
            const int64_t columns = std::min((across + strips - 1) / strips * first.columns, g.width);
            const int64_t share = longest_share(p.images * head_groups * strips * down, threads);
            const int64_t rows = share * first.rows + 2 * ((share + down - 1) / down);  // two more where a strip begins
            const double of_row = (columns + 2) * p.channels() * (3 * g.depth * heads + kNorm);
            const double of_tokens = share * first.rows * columns * heads * g.depth * (27 + 2 * g.depth);
            cheapest.offer({head_groups, strips}, rows * of_row + of_tokens);
        });
    });
    std::tie(p.head_groups, p.strips) = cheapest.way();
    const WindowBlock block = g.block(0);
    Cheapest<int64_t> shares;
    for_cuts(block.tiles(), 1, [&](int64_t count) {
        shares.offer(count, longest_share(g.blocks() * count, threads) * ((block.tiles() + count - 1) / count));
    });
    p.block_shares = shares.way();
}

at::Tensor run_layer(ChannelAttentionLayerParams& p, const at::Tensor& x_) {
    const at::Tensor x = channels_last(x_), out = empty_channels_last(x.sizes(), x);
    Groups& g = p.groups;
    p.dtype = dtype_of(x);
    p.brgemm = brgemm_of(p.dtype);
    p.images = x.size(0);
    p.x = x.const_data_ptr();
    p.out = out.mutable_data_ptr();
    at::Tensor queries;
    if (g.dilation > 1) {
        queries = empty_channels_last({x.size(0), 2 * x.size(1), x.size(2), x.size(3)}, x);
        p.queries = queries.mutable_data_ptr();
        p.vertical = Axis::whole(g.height, kBlockRows);
        p.horizontal = Axis::whole(g.width, kBlockColumns);
    } else {
        p.vertical = g.vertical;
        p.horizontal = g.horizontal;
    }
    const int64_t threads = at::get_num_threads();
    partition(p, threads);

    const int64_t floats = static_cast<int64_t>(sizeof(float));
    WorkSpace space;
    const int64_t joint = p.project_rows == nullptr ? 0 : space.add(p.images * p.packed_project_bytes());
    const int64_t each =
        round_up(std::max({p.gram_scratch(), attend_scratch(g), p.join_scratch(), p.apply_scratch()}), kChannelPad);
    const int64_t slots = space.add(g.slots_bytes()), attention = space.add(g.attention_bytes());
    const int64_t scratch = space.add(threads * each * floats);
    space.allocate();
    p.joint = p.project_rows == nullptr ? nullptr : space.at<void>(joint);
    g.slots = space.at<float>(slots);
    g.attention = space.at<float>(attention);

    const auto& kernel = kernels_in_use<ChannelAttentionLayerKernels>();
    const auto& attend = kernels_in_use<ChannelAttentionKernels>();
    const auto for_all = [&](int64_t count, const auto& pass) {
        at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
            const ProductScope scope{p.brgemm};
            pass(begin, end, space.at<float>(scratch) + at::get_thread_num() * each);
        });
    };
    for_all(p.images * p.head_groups * p.strips * p.vertical.blocks(),
            [&](auto... share) { kernel.gram(p, share...); });
    if (g.dilation > 1) {
        const int64_t pixel = 2 * p.channels();
        const Pixels q{p.queries, pixel}, k{static_cast<char*>(p.queries) + pixel / 2 * x.element_size(), pixel};
        const ChannelAttentionParams maps{p.dtype, p.brgemm, g, q, k, {}, nullptr};
        for_all(g.blocks() * g.heads, [&](auto... share) { attend.gram(maps, share...); });
    }
    for_all(g.windows() * g.heads * g.branches, [&](auto... share) { attend.attend(g, share...); });
    if (g.overlapping()) {
        for_all(g.blocks() * g.heads, [&](int64_t begin, int64_t end, float*) { attend.average(g, begin, end); });
    }
    if (p.joint != nullptr) {
        for_all(p.images, [&](auto... share) { kernel.join(p, share...); });
    }
    for_all(g.blocks() * p.block_shares, [&](auto... share) { kernel.apply(p, share...); });
    return out;
}

// Every intermediate is computed again and dropped after its last use; at most three maps of three times the channels
// exist at once.
LayerGradients layer_backward(const at::Tensor& grad_, const LayerTensors& tensors, double eps, bool centered,
                              bool residual, const std::function<at::Tensor(const at::Tensor&)>& attend,
                              const std::function<at::Tensor(const at::Tensor&, const at::Tensor&)>& attend_backward) {
    const auto& [x_, norm_weight_, norm_bias_, qkv_weight_, depthwise_weight_, project_weight_, qkv_bias,
                 depthwise_bias, project_bias, gate] = tensors;
    check_image(x_, "x");
    check_tensor(grad_, "grad", x_.sizes(), x_);
    const at::Tensor grad = channels_last(with_range(grad_)), x = channels_last(with_range(x_));
    const at::Tensor norm_weight = wide(norm_weight_), qkv_weight = with_range(qkv_weight_);
    const at::Tensor project_weight = with_range(project_weight_);
    const OptionalTensor norm_bias = wide(norm_bias_);
    at::Tensor depthwise_weight, projected;
    at::Tensor normed = layer_norm_2d(x, norm_weight, norm_bias, eps, centered);
    at::Tensor qkv = pointwise(normed, qkv_weight, qkv_bias);
    if (depthwise_weight_.has_value()) {
        check_tensor(*depthwise_weight_, "depthwise_weight", {3 * x.size(1), 1, 3, 3}, x_);
        depthwise_weight = with_range(*depthwise_weight_);
        projected = std::exchange(qkv, depthwise(qkv, depthwise_weight, depthwise_bias));
    }
    const ParameterGradients of_project = pointwise_gradients(grad, attend(qkv), project_weight, project_bias, gate);
    at::Tensor grad_qkv = attend_backward(pointwise_input_gradient(grad, project_weight, gate), qkv);
    qkv.reset();
    ParameterGradients of_depthwise{at::empty({0}, at::kFloat), at::empty({0}, at::kFloat), {}};
    if (depthwise_weight.defined()) {
        of_depthwise = depthwise_gradients(grad_qkv, projected, 3, depthwise_bias);
        projected.reset();
        grad_qkv = depthwise_input_gradient(grad_qkv, depthwise_weight);
    }
    const ParameterGradients of_qkv = pointwise_gradients(grad_qkv, normed, qkv_weight, qkv_bias);
    normed.reset();
    at::Tensor grad_normed = pointwise_input_gradient(grad_qkv, qkv_weight);
    grad_qkv.reset();
    auto [grad_x, grad_norm_weight, grad_norm_bias] =
        layer_norm_2d_backward(grad_normed, x, norm_weight, norm_bias, eps, centered);
    if (residual) {
        grad_x.add_(grad);
    }
    return {grad_x,      grad_norm_weight,  grad_norm_bias,  of_qkv.weight,  of_depthwise.weight, of_project.weight,
            of_qkv.bias, of_depthwise.bias, of_project.bias, of_project.gate};
}

}  // namespace ipt_fast::cpu
