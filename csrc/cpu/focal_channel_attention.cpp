// focal_channel_attention and its backward: checks, registration. Passes and arithmetic are those of channel_attention.
#include <ATen/TensorOperators.h>
#include <ATen/ops/reciprocal.h>
#include <ATen/ops/square.h>
#include <torch/library.h>

#include <tuple>

#include "channel_attention.h"
#include "matrix_unit.h"

namespace ipt_fast::cpu {
namespace {

// A parameter of this shape, or one for each of two branches. Returns the step between them, 0 where there is one.
int64_t check_branches(const at::Tensor& parameter, const char* name, at::IntArrayRef shape, const at::Tensor& like) {
    at::DimVector two{2};
    two.append(shape.begin(), shape.end());
    const bool each = parameter.sizes() == at::IntArrayRef(two);
    TORCH_CHECK_VALUE(each || parameter.sizes() == shape, name, " must have shape ", shape, " or ",
                      at::IntArrayRef(two), "; got ", parameter.sizes());
    check_tensor(parameter, name, parameter.sizes(), like, true);
    return each ? parameter.numel() / 2 : 0;
}

at::Tensor as_float(const at::Tensor& parameter) { return parameter.to(at::kFloat).contiguous(); }

// The groups of a map `x` of all heads' channels, with the parameters. The slots are still missing.
struct FocalGroups : FocalParameters {
    FocalGroups(const at::Tensor& x, const at::Tensor& temperature, const at::Tensor& token_weight,
                const at::Tensor& top_weight, const at::Tensor& bottom_weight, int64_t num_heads, int64_t window_size,
                bool cyclic)
        : FocalParameters(x, temperature, token_weight, top_weight, bottom_weight, num_heads, window_size, cyclic),
          groups(focal_groups(x, num_heads, window_size, cyclic)) {
        set_branches(groups.scale, scale.const_data_ptr<float>(), scale_step);
        set_branches(groups.token_squares, token_squares.const_data_ptr<float>(), token_step);
        groups.merge[0] = top.const_data_ptr<float>();
        groups.merge[1] = bottom.const_data_ptr<float>();
    }

    Groups groups;
};

}  // namespace

FocalParameters::FocalParameters(const at::Tensor& like, const at::Tensor& temperature, const at::Tensor& token_weight,
                                 const at::Tensor& top_weight, const at::Tensor& bottom_weight, int64_t num_heads,
                                 int64_t window_size, bool cyclic) {
    TORCH_CHECK_VALUE(window_size > 0, "window_size must be at least 1; got ", window_size);
    TORCH_CHECK_VALUE(cyclic || window_size % 2 == 0, "window_size must be even where cyclic is False; got ",
                      window_size);
    const int64_t map[] = {num_heads, window_size, window_size};
    scale_step = check_branches(temperature, "temperature", {num_heads}, like);
    token_step = check_branches(token_weight, "token_weight", map, like);
    check_tensor(top_weight, "top_weight", map, like, true);
    check_tensor(bottom_weight, "bottom_weight", map, like, true);
    scale = at::reciprocal(as_float(temperature));
    token_squares = at::square(as_float(token_weight));
    top = as_float(top_weight);
    bottom = as_float(bottom_weight);
}

Groups focal_groups(const at::Tensor& x, int64_t num_heads, int64_t window_size, bool cyclic) {
    Groups g = groups_of(x, num_heads, Axis::windows_of(x.size(2), window_size, 2),
                         Axis::windows_of(x.size(3), window_size, 2), 2);
    g.inner = !cyclic;
    return g;
}

at::Tensor focal_channel_attention(const at::Tensor& qkv_, const at::Tensor& temperature,
                                   const at::Tensor& token_weight, const at::Tensor& top_weight,
                                   const at::Tensor& bottom_weight, int64_t num_heads, int64_t window_size,
                                   bool cyclic) {
    check_image(qkv_, "qkv");
    const int64_t channels = attention_channels(qkv_);
    check_heads(channels, num_heads, "a third of qkv");
    const at::Tensor qkv = with_pixels(qkv_);
    const at::Tensor out = empty_channels_last({qkv.size(0), channels, qkv.size(2), qkv.size(3)}, qkv);
    const FocalGroups focal(out, temperature, token_weight, top_weight, bottom_weight, num_heads, window_size, cyclic);
    ChannelAttentionParams params{};
    params.dtype = dtype_of(qkv);
    params.brgemm = brgemm_of(params.dtype);
    params.groups = focal.groups;
    const auto part = [&](int64_t index) { return pixels_of(qkv.narrow(1, index * channels, channels)); };
    params.q = part(0);
    params.k = part(1);
    params.v = part(2);
    params.out = out.mutable_data_ptr();
    run(params);
    return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> focal_channel_attention_backward(
    const at::Tensor& grad_, const at::Tensor& qkv_, const at::Tensor& temperature, const at::Tensor& token_weight,
    const at::Tensor& top_weight, const at::Tensor& bottom_weight, int64_t num_heads, int64_t window_size,
    bool cyclic) {
    check_image(qkv_, "qkv");
    const int64_t channels = attention_channels(qkv_);
    check_heads(channels, num_heads, "a third of qkv");
    check_tensor(grad_, "grad", {qkv_.size(0), channels, qkv_.size(2), qkv_.size(3)}, qkv_);
    const at::Tensor qkv = with_pixels(qkv_), grad = channels_last(grad_);
    const at::Tensor grad_qkv = empty_channels_last(qkv.sizes(), qkv);
    const FocalGroups focal(grad, temperature, token_weight, top_weight, bottom_weight, num_heads, window_size, cyclic);
    ChannelAttentionBackwardParams p{};
    p.dtype = dtype_of(qkv);
    p.brgemm = brgemm_of(p.dtype);
    p.groups = focal.groups;
    const auto part = [&](const at::Tensor& map, int64_t index) { return map.narrow(1, index * channels, channels); };
    p.q = pixels_of(part(qkv, 0));
    p.k = pixels_of(part(qkv, 1));
    p.v = pixels_of(part(qkv, 2));
    p.grad = pixels_of(grad);
    p.grad_q = part(grad_qkv, 0).mutable_data_ptr();
    p.grad_k = part(grad_qkv, 1).mutable_data_ptr();
    p.grad_v = part(grad_qkv, 2).mutable_data_ptr();
    p.grad_pixel = 3 * channels;
    const Sums sums = run(p);
    // a parameter of both branches gets the sum of their gradients
    const at::Tensor alpha = temperature.to(at::kDouble), of_scale = focal.scale_step ? sums.scale : sums.scale.sum(0);
    const at::Tensor of_tokens = sums.maps.narrow(0, 0, 2), of_token = focal.token_step ? of_tokens : of_tokens.sum(0);
    return {grad_qkv, like(-of_scale / (alpha * alpha), temperature), like(of_token * token_weight, token_weight),
            like(sums.maps[2], top_weight), like(sums.maps[3], bottom_weight)};
}

TORCH_LIBRARY_IMPL(ipt_fast_cpu, CPU, m) {
    m.impl("focal_channel_attention", focal_channel_attention);
    m.impl("focal_channel_attention_backward", focal_channel_attention_backward);
}

}  // namespace ipt_fast::cpu
