// Grid attention and its gradient, which the backward of the grid attention layer is made of, and what the layer shares
// with them.
#pragma once

#include <tuple>

#include "arguments.h"
#include "grid_attention_kernel.h"

namespace ipt_fast::cpu {

// Checks what goes with a map of `channels`; `like` has its dtype.
void check_attention(const at::Tensor& like, int64_t channels, const OptionalTensor& bias_table, int64_t num_heads,
                     int64_t grid_size);

// The size of the lattice for this map: without a table it need not be finer than the map.
int64_t finest_grid(const at::Tensor& map, const OptionalTensor& bias_table, int64_t grid_size);

// Fills in the common parameters but the biases.
void set_lattice(GridAttention& p, const at::Tensor& map, int64_t channels, int64_t num_heads, int64_t grid_size);

// (heads, bias_rows, bias_row) as described at GridAttention::bias.
at::Tensor spread_biases(const GridAttention& p, const OptionalTensor& table);

// Checks the arguments and fills in the common parameters; `map` has `channels` = heads * depth or three times as
// many. The returned tensor holds the biases.
at::Tensor set_attention(GridAttention& p, const at::Tensor& map, int64_t channels, const OptionalTensor& bias_table,
                         int64_t num_heads, int64_t grid_size);

at::Tensor grid_attention(const at::Tensor& qkv, const OptionalTensor& bias_table, int64_t num_heads,
                          int64_t grid_size);

std::tuple<at::Tensor, at::Tensor> grid_attention_backward(const at::Tensor& grad, const at::Tensor& qkv,
                                                           const OptionalTensor& bias_table, int64_t num_heads,
                                                           int64_t grid_size);

}  // namespace ipt_fast::cpu
