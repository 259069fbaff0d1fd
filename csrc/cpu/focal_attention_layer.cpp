// focal_attention_layer and its backward: what is its own, registration. channel_layers.h has the rest.
#include <torch/library.h>

#include <tuple>

#include "channel_attention.h"
#include "channel_layers.h"

namespace ipt_fast::cpu {
namespace {

struct PackedFocalAttentionLayer : PackedAttentionLayer {
    int64_t window;
    bool cyclic;
    int64_t token_squares, top, bottom;  // pieces
    int64_t scale_step, token_step;      // as in FocalParameters
};

at::Tensor pack_focal_attention_layer(const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                                      const at::Tensor& qkv_weight, const at::Tensor& depthwise_weight,
                                      const at::Tensor& project_weight, const at::Tensor& temperature,
                                      const at::Tensor& token_weight, const at::Tensor& top_weight,
                                      const at::Tensor& bottom_weight, const OptionalTensor& qkv_bias,
                                      const OptionalTensor& depthwise_bias, const OptionalTensor& project_bias,
                                      const OptionalTensor& gate, int64_t num_heads, int64_t window_size, double eps,
                                      bool centered, bool cyclic) {
    LayerConvolutions convolutions(qkv_weight, depthwise_weight, project_weight, qkv_bias, depthwise_bias, project_bias,
                                   num_heads);
    const LayerNorm norm(qkv_weight, norm_weight, norm_bias, eps, centered);
    const LayerEpilogue epilogue(qkv_weight, project_bias, gate);
    const FocalParameters focal(qkv_weight, temperature, token_weight, top_weight, bottom_weight, num_heads,
                                window_size, cyclic);
    Packing<PackedFocalAttentionLayer> packing(Layer::focal_attention_layer, qkv_weight);
    PackedFocalAttentionLayer& header = packing.header;
    header.window = window_size;
    header.cyclic = cyclic;
    header.scale_step = focal.scale_step;
    header.token_step = focal.token_step;
    convolutions.add_to(packing);
    header.scale = packing.add(focal.scale);
    header.token_squares = packing.add(focal.token_squares);
    header.top = packing.add(focal.top);
    header.bottom = packing.add(focal.bottom);
    packing.add(norm);
    packing.add(epilogue);
    packing.allocate();
    convolutions.fill(packing);
    packing.fill(header.scale, focal.scale);
    packing.fill(header.token_squares, focal.token_squares);
    packing.fill(header.top, focal.top);
    packing.fill(header.bottom, focal.bottom);
    packing.fill(norm);
    packing.fill(epilogue);
    return packing.block;
}

at::Tensor focal_attention_layer_packed(const at::Tensor& x, const at::Tensor& packed_,
                                        const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                                        const OptionalTensor& gate) {
    const Packed<PackedFocalAttentionLayer> packed(packed_, Layer::focal_attention_layer, x);
    const PackedFocalAttentionLayer& header = packed.header();
    const LayerNorm norm = norm_of(header, x, norm_weight, norm_bias);
    const LayerEpilogue epilogue = epilogue_of(header, x, gate);
    ChannelAttentionLayerParams params =
        layer_params(packed, focal_groups(x, header.heads, header.window, header.cyclic), norm, epilogue);
    Groups& g = params.groups;
    set_branches(g.scale, g.scale[0], header.scale_step);
    set_branches(g.token_squares, packed.at<float>(header.token_squares), header.token_step);
    g.merge[0] = packed.at<float>(header.top);
    g.merge[1] = packed.at<float>(header.bottom);
    return run_layer(params, x);
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

FocalLayerGradients focal_attention_layer_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& norm_weight, const OptionalTensor& norm_bias,
    const at::Tensor& qkv_weight, const at::Tensor& depthwise_weight, const at::Tensor& project_weight,
    const at::Tensor& temperature_, const at::Tensor& token_weight_, const at::Tensor& top_weight_,
    const at::Tensor& bottom_weight_, const OptionalTensor& qkv_bias, const OptionalTensor& depthwise_bias,
    const OptionalTensor& project_bias, const OptionalTensor& gate, int64_t num_heads, int64_t window_size, double eps,
    bool centered, bool cyclic) {
    const at::Tensor temperature = wide(temperature_), token_weight = wide(token_weight_);
    const at::Tensor top_weight = wide(top_weight_), bottom_weight = wide(bottom_weight_);
    at::Tensor grad_temperature, grad_token, grad_top, grad_bottom;
    LayerGradients of = layer_backward(
        grad,
        {x, norm_weight, norm_bias, qkv_weight, depthwise_weight, project_weight, qkv_bias, depthwise_bias,
         project_bias, gate},
        eps, centered, true,
        [&](const at::Tensor& qkv) {
            return focal_channel_attention(qkv, temperature, token_weight, top_weight, bottom_weight, num_heads,
                                           window_size, cyclic);
        },
        [&](const at::Tensor& grad_out, const at::Tensor& qkv) {
            at::Tensor grad_qkv;
            std::tie(grad_qkv, grad_temperature, grad_token, grad_top, grad_bottom) = focal_channel_attention_backward(
                grad_out, qkv, temperature, token_weight, top_weight, bottom_weight, num_heads, window_size, cyclic);
            return grad_qkv;
        });
    return {of.x,
            of.norm_weight,
            of.norm_bias,
            of.qkv_weight,
            of.depthwise_weight,
            of.project_weight,
            grad_temperature,
            grad_token,
            grad_top,
            grad_bottom,
            of.qkv_bias,
            of.depthwise_bias,
            of.project_bias,
            of.gate};
}

}  // namespace

// For tests: groups of heads and strips of pass 1, shares of a block in pass 2.
TORCH_LIBRARY_FRAGMENT(ipt_fast_cpu, m) {
    m.def(
        "focal_partition(int batch, int height, int width, int channels, int heads, int window, int threads) -> (int, "
        "int, int)",
        [](int64_t batch, int64_t height, int64_t width, int64_t channels, int64_t heads, int64_t window,
           int64_t threads) {
            ChannelAttentionLayerParams p{};
            Groups& g = p.groups;
            g.images = p.images = batch;
            g.heads = heads;
            g.head_channels = channels / heads;
            g.depth = padded(g.head_channels);
            g.vertical = p.vertical = Axis::windows_of(height, window, 2);
            g.horizontal = p.horizontal = Axis::windows_of(width, window, 2);
            g.dilation = 1;
            g.height = height;
            g.width = width;
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
