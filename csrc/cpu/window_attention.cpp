// window_attention and its backward: attention inside the windows of maps of q, k and v.
#include <torch/library.h>

#include <tuple>

#include "group_attention.h"

namespace ipt_fast::cpu {
namespace {

AttentionOptions options_of(const OptionalTensor& bias, const OptionalTensor& temperature, int64_t num_heads,
                            at::IntArrayRef window_size, at::IntArrayRef key_size, at::IntArrayRef shift,
                            double scale) {
    const auto pair = [](at::IntArrayRef sizes) { return std::array<int64_t, 2>{sizes[0], sizes[1]}; };
    return {{false, num_heads, pair(window_size), pair(key_size), pair(shift), scale}, bias, temperature};
}

at::Tensor window_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const OptionalTensor& bias,
                            const OptionalTensor& temperature, int64_t num_heads, at::IntArrayRef window_size,
                            at::IntArrayRef key_size, at::IntArrayRef shift, double scale) {
    return group_attention(q, k, v, options_of(bias, temperature, num_heads, window_size, key_size, shift, scale));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> window_attention_backward(
    const at::Tensor& grad, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const OptionalTensor& bias,
    const OptionalTensor& temperature, int64_t num_heads, at::IntArrayRef window_size, at::IntArrayRef key_size,
    at::IntArrayRef shift, double scale) {
    const AttentionOptions options = options_of(bias, temperature, num_heads, window_size, key_size, shift, scale);
    const AttentionGradients found = group_attention_backward(grad, q, k, v, options, false);
    return {found.q, found.k, found.v, found.bias, found.temperature};
}

}  // namespace

TORCH_LIBRARY_IMPL(ipt_fast_cpu, CPU, m) {
    m.impl("window_attention", window_attention);
    m.impl("window_attention_backward", window_attention_backward);
}

}  // namespace ipt_fast::cpu
