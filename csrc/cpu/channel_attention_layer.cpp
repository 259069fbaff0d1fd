// channel_attention_layer and its backward: what is its own, registration. channel_layers.h has the rest.
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "channel_attention.h"
#include "channel_layers.h"

namespace ipt_fast::cpu {
namespace {

struct PackedChannelAttentionLayer : PackedAttentionLayer {
    GroupKind kind;
    bool residual;
};

at::Tensor pack_channel_attention_layer(const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                                        const at::Tensor& qkv_weight, const OptionalTensor& depthwise_weight,
                                        const at::Tensor& project_weight, const at::Tensor& temperature,
                                        const OptionalTensor& qkv_bias, const OptionalTensor& depthwise_bias,
                                        const OptionalTensor& project_bias, const OptionalTensor& gate,
                                        int64_t num_heads, at::OptionalIntArrayRef window_size,
                                        std::optional<int64_t> dilation, bool overlapping, double eps, bool centered,
                                        bool residual) {
    LayerConvolutions convolutions(qkv_weight, depthwise_weight, project_weight, qkv_bias, depthwise_bias, project_bias,
                                   num_heads);
    const LayerNorm norm(qkv_weight, norm_weight, norm_bias, eps, centered);
    const LayerEpilogue epilogue(qkv_weight, project_bias, gate);
    check_per_head(temperature, "temperature", num_heads, qkv_weight);
    const at::Tensor scale = padded_parameter(temperature.flatten(), padded(num_heads));
    const int64_t channels = qkv_weight.size(1);
    // (channels of the attention, padded channels of the output)
    const at::Tensor project_rows = padded_parameter(project_weight.flatten(1).t(), padded(channels));
    Packing<PackedChannelAttentionLayer> packing(Layer::channel_attention_layer, qkv_weight);
    PackedChannelAttentionLayer& header = packing.header;
    header.kind = {window_size, dilation, overlapping};
    header.residual = residual;
    convolutions.add_to(packing);
    header.scale = packing.add(scale);
    header.project_rows = packing.add(project_rows);
    packing.add(norm);
    packing.add(epilogue);
    packing.allocate();
    convolutions.fill(packing);
    packing.fill(header.scale, scale);
    packing.fill(header.project_rows, project_rows);
    packing.fill(norm);
    packing.fill(epilogue);
    return packing.block;
}

at::Tensor channel_attention_layer_packed(const at::Tensor& x, const at::Tensor& packed_,
                                          const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                                          const OptionalTensor& gate) {
    const Packed<PackedChannelAttentionLayer> packed(packed_, Layer::channel_attention_layer, x);
    const PackedChannelAttentionLayer& header = packed.header();
    const LayerNorm norm = norm_of(header, x, norm_weight, norm_bias);
    const LayerEpilogue epilogue = epilogue_of(header, x, gate);
    const Groups groups = channel_groups(x, header.heads, header.kind);
    ChannelAttentionLayerParams params = layer_params(packed, groups, norm, epilogue);
    params.residual = header.residual;
    // To multiply the projection with the attention pays where there are more pixels than channels.
    if (!header.kind.whole(x) || x.size(2) * x.size(3) < 2 * x.size(1)) {
        params.project_rows = nullptr;
    }
    return run_layer(params, x);
}

at::Tensor channel_attention_layer(const at::Tensor& x, const at::Tensor& norm_weight, const OptionalTensor& norm_bias,
                                   const at::Tensor& qkv_weight, const OptionalTensor& depthwise_weight,
                                   const at::Tensor& project_weight, const at::Tensor& temperature,
                                   const OptionalTensor& qkv_bias, const OptionalTensor& depthwise_bias,
                                   const OptionalTensor& project_bias, const OptionalTensor& gate, int64_t num_heads,
                                   at::OptionalIntArrayRef window_size, std::optional<int64_t> dilation,
                                   bool overlapping, double eps, bool centered, bool residual) {
    check_image(x, "x");
    check_tensor(qkv_weight, "qkv_weight", {3 * x.size(1), x.size(1), 1, 1}, x);
    const KeptLevel level;
    return channel_attention_layer_packed(
        x,
        pack_channel_attention_layer({}, {}, qkv_weight, depthwise_weight, project_weight, temperature, qkv_bias,
                                     depthwise_bias, project_bias, {}, num_heads, window_size, dilation, overlapping,
                                     eps, centered, residual),
        norm_weight, norm_bias, gate);
}

using ChannelLayerGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
                                         at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

ChannelLayerGradients channel_attention_layer_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& norm_weight, const OptionalTensor& norm_bias,
    const at::Tensor& qkv_weight, const OptionalTensor& depthwise_weight, const at::Tensor& project_weight,
    const at::Tensor& temperature_, const OptionalTensor& qkv_bias, const OptionalTensor& depthwise_bias,
    const OptionalTensor& project_bias, const OptionalTensor& gate, int64_t num_heads,
    at::OptionalIntArrayRef window_size, std::optional<int64_t> dilation, bool overlapping, double eps, bool centered,
    bool residual) {
    const GroupKind kind(window_size, dilation, overlapping);
    const at::Tensor temperature = wide(temperature_);
    at::Tensor grad_temperature;
    LayerGradients of = layer_backward(
        grad,
        {x, norm_weight, norm_bias, qkv_weight, depthwise_weight, project_weight, qkv_bias, depthwise_bias,
         project_bias, gate},
        eps, centered, residual,
        [&](const at::Tensor& qkv) {
            const auto maps = qkv.chunk(3, 1);
            return channel_attention(maps[0], maps[1], maps[2], temperature, num_heads, kind);
        },
        [&](const at::Tensor& grad_out, const at::Tensor& qkv) {
            at::Tensor grad_qkv = empty_channels_last(qkv.sizes(), qkv);
            const auto maps = qkv.chunk(3, 1), grads = grad_qkv.chunk(3, 1);
            grad_temperature = channel_attention_backward(grad_out, maps[0], maps[1], maps[2], temperature, num_heads,
                                                          kind, grads[0], grads[1], grads[2]);
            return grad_qkv;
        });
    return {of.x,
            of.norm_weight,
            of.norm_bias,
            of.qkv_weight,
            of.depthwise_weight,
            of.project_weight,
            grad_temperature,
            of.qkv_bias,
            of.depthwise_bias,
            of.project_bias,
            of.gate};
}

}  // namespace

TORCH_LIBRARY_IMPL(ipt_fast_cpu, CPU, m) {
    m.impl("channel_attention_layer", channel_attention_layer);
    m.impl("pack_channel_attention_layer", pack_channel_attention_layer);
    m.impl("channel_attention_layer_packed", channel_attention_layer_packed);
    m.impl("channel_attention_layer_backward", channel_attention_layer_backward);
}

}  // namespace ipt_fast::cpu
