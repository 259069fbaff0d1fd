// Feed-forward networks with their weights, which leffn, leffn_layer and feed_forward_layer share.
#pragma once

#include <ATen/ops/empty.h>

#include <string_view>

#include "feed_forward_kernel.h"
#include "packed.h"

namespace ipt_fast::cpu {

// expand (M, C, 1, 1), depthwise (M, 1, K, K) with odd K, project (N, M, 1, 1), and biases (M), (M), (N) or None. Of
// two halves only the projected one, or the convolved ones, have M / 2 instead. Without a convolution, depthwise is one
// tap of 1. The inner norm, (M / 2), is that of Tail::gate.
struct FeedForwardWeights {
    at::Tensor expand, depthwise, project;
    OptionalTensor expand_bias, depthwise_bias, project_bias;
    Form form = kLeffn;
    OptionalTensor inner_weight, inner_bias;
    double inner_eps = 1e-5;

    int64_t hidden() const { return expand.size(0) / form.halves(); }  // of a half

    void check() const;
    // Also that they go with x (B, C, H, W).
    void check(const at::Tensor& x) const;
    // What the biases behind the last GELU or product of the network add to its output, fp32: a constant, as everything
    // between is linear and depthwise_bias is added at every pixel.
    OptionalTensor output_bias() const;
};

// What belongs to hidden channels, along the first axis, with each half padded to kChannelPad with zeros.
at::Tensor padded_halves(const at::Tensor& values, int64_t halves);
// The inverse, with `size` channels in each half.
at::Tensor unpadded_halves(const at::Tensor& values, int64_t size, int64_t halves);

// The gradients of a network's input and, in fp32, of its arguments; empty where there is none.
struct FeedForwardGradients {
    at::Tensor x, expand, depthwise, project;
    at::Tensor expand_bias = empty(), depthwise_bias = empty(), project_bias = empty(), gate = empty();
    at::Tensor inner_weight = empty(), inner_bias = empty();

    static at::Tensor empty() { return at::empty({0}, at::kFloat); }
};

// Of leffn and gdfn: the gradients of norm(x) and of the arguments of gate * network(norm(x)).
FeedForwardGradients convolved_gradients(const at::Tensor& grad, const at::Tensor& x, const FeedForwardWeights& w,
                                         const OptionalTensor& gate, const Norm& norm);

// The same without a convolution.
FeedForwardGradients mlp_gradients(const at::Tensor& grad, const at::Tensor& x, const FeedForwardWeights& w,
                                   const OptionalTensor& gate, const Norm& norm);

// Adds what follows from `sums` (B, N), grad summed over each image's pixels: gradients of the biases behind the GELU,
// and what these biases give to others.
void add_output_biases(FeedForwardGradients& gradients, const at::Tensor& sums, const FeedForwardWeights& w,
                       const OptionalTensor& gate);

// The weights of feed_forward_layer for a form by name; depthwise is None for "mlp".
FeedForwardWeights weights_of_form(std::string_view form, const at::Tensor& expand, const OptionalTensor& depthwise,
                                   const at::Tensor& project, const OptionalTensor& expand_bias,
                                   const OptionalTensor& depthwise_bias, const OptionalTensor& project_bias,
                                   const OptionalTensor& inner_weight, const OptionalTensor& inner_bias,
                                   double inner_eps);

struct PackedFeedForward : PackedHeader {
    Form form;
    int64_t hidden, out_channels, kernel;  // hidden channels of a half
    int64_t expand, project, depthwise;    // pieces
    int64_t expand_bias;                   // 0: there is none
    int64_t depthwise_bias;                // 0: it is a part of the epilogue's
    int64_t inner_weight, inner_bias;      // 0: there is no inner norm
    float inner_eps;
};

// `norm` is nullptr where there is none.
at::Tensor pack(Layer layer, const LayerNorm* norm, const FeedForwardWeights& w, const OptionalTensor& gate);
at::Tensor pack_layer(Layer layer, const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                      const FeedForwardWeights& w, const OptionalTensor& gate, double eps, bool centered);

// epilogue(network(norm(x))), of a layer with x added.
at::Tensor run(Layer layer, const at::Tensor& x, const Packed<PackedFeedForward>& packed, const Norm& norm,
               const Epilogue& epilogue);
at::Tensor run_layer(Layer layer, const at::Tensor& x, const at::Tensor& packed, const OptionalTensor& norm_weight,
                     const OptionalTensor& norm_bias, const OptionalTensor& gate);

}  // namespace ipt_fast::cpu
