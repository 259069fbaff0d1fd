// What layers of channel attention share: their packed weights, the passes over a map, and the backward.
#pragma once

#include <functional>

#include "channel_attention_layer_kernel.h"
#include "level.h"
#include "packed.h"

namespace ipt_fast::cpu {

// A layer's own header derives from it.
struct PackedAttentionLayer : PackedHeader {
    int64_t heads, halo;
    int64_t weights, depthwise, scale;  // pieces
    int64_t outside, project_rows;      // pieces; 0: there is none
};

// The convolutions of a layer: their arguments checked, and what kernels read of them.
struct LayerConvolutions {
    // Without a depthwise weight there is no depthwise convolution.
    LayerConvolutions(const at::Tensor& qkv_weight, const OptionalTensor& depthwise_weight,
                      const at::Tensor& project_weight, const OptionalTensor& qkv_bias,
                      const OptionalTensor& depthwise_bias, const OptionalTensor& project_bias, int64_t num_heads);

    ChannelAttentionLayerParams params{};
    at::Tensor taps, outside;

    template <typename Header>
    void add_to(Packing<Header>& packing) const {
        Header& header = packing.header;
        header.heads = params.groups.heads;
        header.halo = params.halo;
        header.weights = packing.add(params.packed_bytes());
        header.depthwise = packing.add(taps);
        header.outside = outside.defined() ? packing.add(outside) : 0;
    }
    template <typename Header>
    void fill(const Packing<Header>& packing) {
        packing.fill(packing.header.depthwise, taps);
        if (outside.defined()) {
            packing.fill(packing.header.outside, outside);
        }
        params.packed = packing.template at<void>(packing.header.weights);
        pack();
    }

  private:
    void pack() const;
};

// The parameters of a call, on a map x and packed weights. The groups have their scale, no other parameters.
template <typename Header>
ChannelAttentionLayerParams layer_params(const Packed<Header>& packed, const Groups& groups, const LayerNorm& norm,
                                         const LayerEpilogue& epilogue) {
    const Header& header = packed.header();
    const auto piece = [&](int64_t offset) { return offset == 0 ? nullptr : packed.template at<float>(offset); };
    ChannelAttentionLayerParams p{};
    p.groups = groups;
    p.groups.scale[0] = packed.template at<float>(header.scale);
    p.norm = norm.params;
    p.epilogue = epilogue.params;
    p.residual = true;
    p.halo = header.halo;
    p.depthwise = packed.template at<float>(header.depthwise);
    p.outside = piece(header.outside);
    p.packed = packed.template at<void>(header.weights);
    p.project_rows = piece(header.project_rows);
    return p;
}

// How the work is cut for threads: sets strips, head_groups and block_shares.
void partition(ChannelAttentionLayerParams& p, int64_t threads);

// The output of a layer; p lacks the maps and the work space.
at::Tensor run_layer(ChannelAttentionLayerParams& p, const at::Tensor& x);

// Where a layer's tensors are, in its gradients too.
struct LayerTensors {
    at::Tensor x, norm_weight;
    OptionalTensor norm_bias;
    at::Tensor qkv_weight;
    OptionalTensor depthwise_weight;
    at::Tensor project_weight;
    OptionalTensor qkv_bias, depthwise_bias, project_bias, gate;
};

struct LayerGradients {
    at::Tensor x, norm_weight, norm_bias, qkv_weight, depthwise_weight, project_weight;
    at::Tensor qkv_bias, depthwise_bias, project_bias, gate;
};

// Gradients of y = x + gate * project(attention(depthwise(qkv(norm(x))))). attend(qkv) is the attention;
// attend_backward(grad, qkv) keeps the gradients of its parameters and returns that of qkv.
LayerGradients layer_backward(const at::Tensor& grad, const LayerTensors& tensors, double eps, bool centered,
                              bool residual, const std::function<at::Tensor(const at::Tensor&)>& attend,
                              const std::function<at::Tensor(const at::Tensor&, const at::Tensor&)>& attend_backward);

}  // namespace ipt_fast::cpu
