// grid_attention and its backward: attention inside the dilated lattices of a map of q, k and v.
#include <torch/library.h>

#include <tuple>

#include "group_attention.h"

namespace ipt_fast::cpu {
namespace {

at::Tensor grid_attention(const at::Tensor& qkv_, const OptionalTensor& bias_table, int64_t num_heads,
                          int64_t grid_size) {
    check_image(qkv_, "qkv");
    const at::Tensor qkv = channels_last(qkv_);
    const auto [q, k, v] = parts_of(qkv);
    return group_attention(q, k, v, lattice_options(bias_table, num_heads, grid_size, q.size(1)));
}

std::tuple<at::Tensor, at::Tensor> grid_attention_backward(const at::Tensor& grad, const at::Tensor& qkv_,
                                                           const OptionalTensor& bias_table, int64_t num_heads,
                                                           int64_t grid_size) {
    check_image(qkv_, "qkv");
    const at::Tensor qkv = channels_last(qkv_);
    const auto [q, k, v] = parts_of(qkv);
    const AttentionOptions options = lattice_options(bias_table, num_heads, grid_size, q.size(1));
    const AttentionGradients found = group_attention_backward(grad, q, k, v, options, true);
    return {found.qkv, found.bias};
}

}  // namespace

TORCH_LIBRARY_IMPL(ipt_fast_cpu, CPU, m) {
    m.impl("grid_attention", grid_attention);
    m.impl("grid_attention_backward", grid_attention_backward);
}

}  // namespace ipt_fast::cpu
