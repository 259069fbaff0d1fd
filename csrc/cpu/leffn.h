// The weights of a feed-forward network, leffn's and leffn_layer's.
#pragma once

#include "arguments.h"

namespace ipt_fast::cpu {

// expand (M, C, 1, 1), depthwise (M, 1, K, K) with odd K, project (N, M, 1, 1), and biases (M), (M), (N) or None.
struct LeffnWeights {
    at::Tensor expand, depthwise, project;
    OptionalTensor expand_bias, depthwise_bias, project_bias;

    void check() const;
    // Also that they go with x (B, C, H, W).
    void check(const at::Tensor& x) const;
    // What the biases behind the GELU add to the output, fp32: a constant, as everything between is linear and
    // depthwise_bias is added at every pixel.
    OptionalTensor output_bias() const;
};

}  // namespace ipt_fast::cpu
