// Attention inside groups of pixels and its gradient: what the operators and layers on lattices and in windows share.
#pragma once

#include <array>

#include "arguments.h"
#include "group_attention_kernel.h"

namespace ipt_fast::cpu {

// How maps of any size are cut.
struct AttentionShape {
    bool lattices;  // windows are dilated lattices, of as many points
    int64_t num_heads;
    std::array<int64_t, 2> window, keys, shift;  // (rows, columns): keys of a window, where windows begin
    double scale;                                // of the scores, without a temperature
};

struct AttentionOptions : AttentionShape {
    OptionalTensor bias;         // (rows, heads) or (heads, queries, keys)
    OptionalTensor temperature;  // one a head
};

AttentionOptions lattice_options(const OptionalTensor& bias_table, int64_t num_heads, int64_t grid_size,
                                 int64_t channels);

// Checks what goes with a map of `channels`; `like` has its dtype.
void check_attention(const AttentionOptions& options, const at::Tensor& like, int64_t channels);

// All but biases and temperature, for maps of queries and of keys.
void set_groups(GroupAttention& p, const AttentionShape& shape, const at::Tensor& queries, const at::Tensor& keys);

// Biases as the kernels read them: a table, or those of every query and key, which `spread_tables` makes of small
// tables, too.
struct SpreadBiases {
    SpreadBiases(const AttentionOptions& options, bool spread_tables);

    at::Tensor values;     // undefined: there are none
    ScoreBiases params{};  // points into `values`
};

at::Tensor group_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                           const AttentionOptions& options);

// The gradients; those of an absent bias and temperature are empty.
struct AttentionGradients {
    at::Tensor q, k, v, bias, temperature;
    at::Tensor qkv;  // as_one: the map that those of q, k and v, of the same size, are views of along the channels
};
AttentionGradients group_attention_backward(const at::Tensor& grad, const at::Tensor& q, const at::Tensor& k,
                                            const at::Tensor& v, const AttentionOptions& options, bool as_one);

// q, k and v as views of their map.
std::array<at::Tensor, 3> parts_of(const at::Tensor& qkv);

}  // namespace ipt_fast::cpu
