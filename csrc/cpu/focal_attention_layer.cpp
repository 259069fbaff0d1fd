// focal_attention_layer and its backward: checks, work partition, registration. The arithmetic is in
// focal_attention_layer_kernel.cpp.
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <utility>

#include "channel_attention.h"
#include "convolution.h"
#include "focal_attention_layer_kernel.h"
#include "layer_norm_2d.h"
#include "level.h"
#include "matrix_unit.h"
#include "packed.h"
#include "partition.h"
#include "work_space.h"

namespace ipt_fast::cpu {
namespace {

// What the norm of a value costs, in multiplications.
constexpr int64_t kNorm = 8;

// Pass 1: as many heads at once as fit the ring in strips of some width (their norm is computed for each group of
// heads), or fewer; strips as wide as fits, or narrower. Pass 2: shares of a block.
void partition(FocalAttentionLayerParams& p, int64_t threads) {
    constexpr int64_t kLeastColumns = 32;
    const Groups& g = p.groups;
    const int64_t column = kRingRows * 3 * g.depth * static_cast<int64_t>(sizeof(float));  // of one head
    const int64_t narrow = std::min(kLeastColumns, g.horizontal.size) + 2;
    const int64_t fitting = std::clamp<int64_t>(kRingBytes / (column * narrow), 1, g.heads);
    const int64_t down = g.vertical.blocks(), across = g.horizontal.blocks();
    const WindowBlock block(g.vertical, g.horizontal, 0);  // none is larger
    Cheapest<std::pair<int64_t, int64_t>> cheapest;
    for_cuts(g.heads, (g.heads + fitting - 1) / fitting, [&](int64_t head_groups) {
        const int64_t heads = (g.heads + head_groups - 1) / head_groups;
        const int64_t widest = std::max<int64_t>(kRingBytes / (column * heads) - 2, 1);
        for_cuts(across, std::min((g.horizontal.size + widest - 1) / widest, across), [&](int64_t strips) {
            const int64_t columns = std::min((across + strips - 1) / strips * block.columns, g.horizontal.size);
            const int64_t share = longest_share(g.images * head_groups * strips * down, threads);
            const int64_t rows = share * block.rows + 2 * ((share + down - 1) / down);  // two more where a strip begins
            const double of_row = (columns + 2) * p.channels() * (3 * g.depth * heads + kNorm);
            const double of_tokens = share * block.rows * columns * heads * g.depth * (27 + 2 * g.depth);
            cheapest.offer({head_groups, strips}, rows * of_row + of_tokens);
        });
    });
    std::tie(p.head_groups, p.strips) = cheapest.way();
    Cheapest<int64_t> shares;
    for_cuts(block.tiles(), 1, [&](int64_t count) {
        shares.offer(count, longest_share(g.blocks() * count, threads) * ((block.tiles() + count - 1) / count));
    });
    p.block_shares = shares.way();
}

struct PackedFocalAttentionLayer : PackedHeader {
    int64_t heads, window;
    bool cyclic;
    int64_t weights, depthwise, scale, token_squares, top, bottom;  // pieces
    int64_t outside;                                                // a piece; 0: there is none
    int64_t scale_step, token_step;                                 // as in FocalParameters
};

// The depthwise convolution with its own bias and that of what it reads, as FocalAttentionLayerParams has it.
struct Depthwise {
    Depthwise(const at::Tensor& weight, const OptionalTensor& qkv_bias, const OptionalTensor& bias, int64_t heads) {
        const int64_t channels = weight.size(0), depth = channels / 3 / heads;
        const auto of_heads = [&](const at::Tensor& values) {  // (3 * channels, ...) -> (heads, ..., 3, depth)
            return values.reshape({3, heads, depth, -1}).permute({1, 3, 0, 2});
        };
        taps = at::zeros({heads, 10, 3, padded(depth)}, at::kFloat);
        taps.narrow(1, 0, 9).narrow(3, 0, depth).copy_(of_heads(weight));
        const at::Tensor start = taps.narrow(1, 9, 1).narrow(3, 0, depth);
        if (bias.has_value()) {
            check_tensor(*bias, "depthwise_bias", {channels}, weight, true);
            start.copy_(of_heads(*bias));
        }
        if (qkv_bias.has_value()) {
            check_tensor(*qkv_bias, "qkv_bias", {channels}, weight, true);
            start.add_(of_heads(weight.flatten(1).to(at::kDouble).sum(1) * *qkv_bias));
            outside = padded_parameter(of_heads(-*qkv_bias), padded(depth));
        }
    }

    at::Tensor taps, outside;
};

at::Tensor pack_focal_attention_layer(const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                                      const at::Tensor& qkv_weight, const at::Tensor& depthwise_weight,
                                      const at::Tensor& project_weight, const at::Tensor& temperature,
                                      const at::Tensor& token_weight, const at::Tensor& top_weight,
                                      const at::Tensor& bottom_weight, const OptionalTensor& qkv_bias,
                                      const OptionalTensor& depthwise_bias, const OptionalTensor& project_bias,
                                      const OptionalTensor& gate, int64_t num_heads, int64_t window_size, double eps,
                                      bool centered, bool cyclic) {
    const int64_t channels = input_channels(qkv_weight, "qkv_weight");
    check_heads(channels, num_heads, "x");
    check_tensor(qkv_weight, "qkv_weight", {3 * channels, channels, 1, 1}, qkv_weight);
    check_tensor(depthwise_weight, "depthwise_weight", {3 * channels, 1, 3, 3}, qkv_weight);
    check_tensor(project_weight, "project_weight", {channels, channels, 1, 1}, qkv_weight);
    if (project_bias.has_value()) {
        check_tensor(*project_bias, "project_bias", {channels}, qkv_weight, true);
    }
    const LayerNorm norm(qkv_weight, norm_weight, norm_bias, eps, centered);
    const LayerEpilogue epilogue(qkv_weight, project_bias, gate);
    const Depthwise depthwise(depthwise_weight, qkv_bias, depthwise_bias, num_heads);
    const FocalParameters focal(qkv_weight, temperature, token_weight, top_weight, bottom_weight, num_heads,
                                window_size, cyclic);
    const int64_t head_channels = channels / num_heads;
    FocalAttentionLayerParams p{};
    p.dtype = dtype_of(qkv_weight);
    p.brgemm = brgemm_of(p.dtype);
    p.groups.heads = num_heads;
    p.groups.head_channels = head_channels;
    p.groups.depth = padded(head_channels);
    p.qkv = weight_of(qkv_weight);
    p.project = weight_of(project_weight);
    Packing<PackedFocalAttentionLayer> packing(Layer::focal_attention_layer, qkv_weight);
    PackedFocalAttentionLayer& header = packing.header;
    header.heads = num_heads;
    header.window = window_size;
    header.cyclic = cyclic;
    header.scale_step = focal.scale_step;
    header.token_step = focal.token_step;
    header.weights = packing.add(p.packed_bytes());
    header.depthwise = packing.add(depthwise.taps);
    header.outside = depthwise.outside.defined() ? packing.add(depthwise.outside) : 0;
    header.scale = packing.add(focal.scale);
    header.token_squares = packing.add(focal.token_squares);
    header.top = packing.add(focal.top);
    header.bottom = packing.add(focal.bottom);
    packing.add(norm);
    packing.add(epilogue);
    packing.allocate();
    packing.fill(header.depthwise, depthwise.taps);
    if (header.outside != 0) {
        packing.fill(header.outside, depthwise.outside);
    }
    packing.fill(header.scale, focal.scale);
    packing.fill(header.token_squares, focal.token_squares);
    packing.fill(header.top, focal.top);
    packing.fill(header.bottom, focal.bottom);
    packing.fill(norm);
    packing.fill(epilogue);
    p.packed = packing.at<void>(header.weights);
    const FocalAttentionLayerKernels& kernel = kernels_in_use<FocalAttentionLayerKernels>();
    at::parallel_for(0, 3 * num_heads + 1, 1, [&](int64_t begin, int64_t end) { kernel.pack(p, begin, end); });
    return packing.block;
}

at::Tensor focal_attention_layer_packed(const at::Tensor& x_, const at::Tensor& packed_,
                                        const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                                        const OptionalTensor& gate) {
    const Packed<PackedFocalAttentionLayer> packed(packed_, Layer::focal_attention_layer, x_);
    const PackedFocalAttentionLayer& header = packed.header();
    const LayerNorm norm = norm_of(header, x_, norm_weight, norm_bias);
    const LayerEpilogue epilogue = epilogue_of(header, x_, gate);
    const at::Tensor x = channels_last(x_), out = empty_channels_last(x.sizes(), x);
    FocalAttentionLayerParams params{};
    params.dtype = dtype_of(x);
    params.brgemm = brgemm_of(params.dtype);
    params.groups = focal_groups(x, header.heads, header.window, header.cyclic);
    params.norm = norm.params;
    params.epilogue = epilogue.params;
    params.x = x.const_data_ptr();
    params.out = out.mutable_data_ptr();
    params.depthwise = packed.at<float>(header.depthwise);
    params.outside = header.outside == 0 ? nullptr : packed.at<float>(header.outside);
    params.packed = packed.at<void>(header.weights);
    partition(params, at::get_num_threads());

    Groups& g = params.groups;
    set_branches(g.scale, packed.at<float>(header.scale), header.scale_step);
    set_branches(g.token_squares, packed.at<float>(header.token_squares), header.token_step);
    g.merge[0] = packed.at<float>(header.top);
    g.merge[1] = packed.at<float>(header.bottom);
    const int64_t threads = at::get_num_threads();
    const int64_t most = std::max({params.gram_scratch(), attend_scratch(g), params.apply_scratch()});
    const int64_t each = round_up(most, kChannelPad);
    WorkSpace space;
    const int64_t slots = space.add(g.slots_bytes()), scratch = space.add(threads * each * sizeof(float));
    space.allocate();
    g.slots = space.at<float>(slots);

    const FocalAttentionLayerKernels& kernel = kernels_in_use<FocalAttentionLayerKernels>();
    const ChannelAttentionKernels& attention = kernels_in_use<ChannelAttentionKernels>();
    const auto for_all = [&](int64_t count, const auto& pass) {
        at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
            const ProductScope scope{params.brgemm};
            pass(begin, end, space.at<float>(scratch) + at::get_thread_num() * each);
        });
    };
    for_all(g.images * params.head_groups * params.strips * g.vertical.blocks(),
            [&](auto... share) { kernel.gram(params, share...); });
    for_all(g.windows() * g.heads * g.branches, [&](auto... share) { attention.attend(g, share...); });
    for_all(g.blocks() * params.block_shares, [&](auto... share) { kernel.apply(params, share...); });
    return out;
}

at::Tensor focal_attention_layer(const at::Tensor& x, const at::Tensor& norm_weight, const OptionalTensor& norm_bias,
                                 const at::Tensor& qkv_weight, const at::Tensor& depthwise_weight,
                                 const at::Tensor& project_weight, const at::Tensor& temperature,
                                 const at::Tensor& token_weight, const at::Tensor& top_weight,
                                 const at::Tensor& bottom_weight, const OptionalTensor& qkv_bias,
                                 const OptionalTensor& depthwise_bias, const OptionalTensor& project_bias,
                                 const OptionalTensor& gate, int64_t num_heads, int64_t window_size, double eps,
                                 bool centered, bool cyclic) {
    check_image(x, "x");
    check_tensor(qkv_weight, "qkv_weight", {3 * x.size(1), x.size(1), 1, 1}, x);
    const KeptLevel level;
    return focal_attention_layer_packed(
        x,
        pack_focal_attention_layer({}, {}, qkv_weight, depthwise_weight, project_weight, temperature, token_weight,
                                   top_weight, bottom_weight, qkv_bias, depthwise_bias, project_bias, {}, num_heads,
                                   window_size, eps, centered, cyclic),
        norm_weight, norm_bias, gate);
}

using FocalLayerGradients =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
               at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Of y = x + gate * project(attention(depthwise(qkv(norm(x))))). Every intermediate is computed again and dropped after
// its last use; at most three maps of three times the channels exist at once.
FocalLayerGradients focal_attention_layer_backward(
    const at::Tensor& grad_, const at::Tensor& x_, const at::Tensor& norm_weight_, const OptionalTensor& norm_bias_,
    const at::Tensor& qkv_weight_, const at::Tensor& depthwise_weight_, const at::Tensor& project_weight_,
    const at::Tensor& temperature_, const at::Tensor& token_weight_, const at::Tensor& top_weight_,
    const at::Tensor& bottom_weight_, const OptionalTensor& qkv_bias, const OptionalTensor& depthwise_bias,
    const OptionalTensor& project_bias, const OptionalTensor& gate, int64_t num_heads, int64_t window_size, double eps,
    bool centered, bool cyclic) {
    check_image(x_, "x");
    check_tensor(grad_, "grad", x_.sizes(), x_);
    check_tensor(depthwise_weight_, "depthwise_weight", {3 * x_.size(1), 1, 3, 3}, x_);

    const at::Tensor grad = channels_last(with_range(grad_)), x = channels_last(with_range(x_));
    const at::Tensor norm_weight = wide(norm_weight_), qkv_weight = with_range(qkv_weight_);
    const at::Tensor depthwise_weight = with_range(depthwise_weight_), project_weight = with_range(project_weight_);
    const at::Tensor temperature = wide(temperature_), token_weight = wide(token_weight_);
    const at::Tensor top_weight = wide(top_weight_), bottom_weight = wide(bottom_weight_);
    const OptionalTensor norm_bias = wide(norm_bias_);
    at::Tensor normed = layer_norm_2d(x, norm_weight, norm_bias, eps, centered);
    at::Tensor projected = pointwise(normed, qkv_weight, qkv_bias);
    at::Tensor qkv = depthwise(projected, depthwise_weight, depthwise_bias);
    const ParameterGradients of_project =
        pointwise_gradients(grad,
                            focal_channel_attention(qkv, temperature, token_weight, top_weight, bottom_weight,
                                                    num_heads, window_size, cyclic),
                            project_weight, project_bias, gate);
    auto [grad_qkv, grad_temperature, grad_token, grad_top, grad_bottom] =
        focal_channel_attention_backward(pointwise_input_gradient(grad, project_weight, gate), qkv, temperature,
                                         token_weight, top_weight, bottom_weight, num_heads, window_size, cyclic);
    qkv.reset();
    const ParameterGradients of_depthwise = depthwise_gradients(grad_qkv, projected, 3, depthwise_bias);
    projected.reset();
    at::Tensor grad_projected = depthwise_input_gradient(grad_qkv, depthwise_weight);
    grad_qkv.reset();
    const ParameterGradients of_qkv = pointwise_gradients(grad_projected, normed, qkv_weight, qkv_bias);
    normed.reset();
    at::Tensor grad_normed = pointwise_input_gradient(grad_projected, qkv_weight);
    grad_projected.reset();
    auto [grad_x, grad_norm_weight, grad_norm_bias] =
        layer_norm_2d_backward(grad_normed, x, norm_weight, norm_bias, eps, centered);
    grad_x.add_(grad);
    return {grad_x,           grad_norm_weight, grad_norm_bias, of_qkv.weight, of_depthwise.weight, of_project.weight,
            grad_temperature, grad_token,       grad_top,       grad_bottom,   of_qkv.bias,         of_depthwise.bias,
            of_project.bias,  of_project.gate};
}

}  // namespace

// For tests: groups of heads and strips of pass 1, shares of a block in pass 2.
TORCH_LIBRARY_FRAGMENT(ipt_fast_cpu, m) {
    m.def(
        "focal_partition(int batch, int height, int width, int channels, int heads, int window, int threads) -> (int, "
        "int, int)",
        [](int64_t batch, int64_t height, int64_t width, int64_t channels, int64_t heads, int64_t window,
           int64_t threads) {
            FocalAttentionLayerParams p{};
            Groups& g = p.groups;
            g.images = batch;
            g.heads = heads;
            g.head_channels = channels / heads;
            g.depth = padded(g.head_channels);
            g.vertical = Axis::windows_of(height, window, 2);
            g.horizontal = Axis::windows_of(width, window, 2);
            partition(p, threads);
            return std::tuple(p.head_groups, p.strips, p.block_shares);
        });
}

TORCH_LIBRARY_IMPL(ipt_fast_cpu, CPU, m) {
    m.impl("focal_attention_layer", focal_attention_layer);
    m.impl("pack_focal_attention_layer", pack_focal_attention_layer);
    m.impl("focal_attention_layer_packed", focal_attention_layer_packed);
    m.impl("focal_attention_layer_backward", focal_attention_layer_backward);
}

}  // namespace ipt_fast::cpu
