// Focal channel attention and its gradient, which the backward of the focal attention layer is made of, and what the
// layer shares with them.
#pragma once

#include <tuple>

#include "arguments.h"
#include "channel_attention_kernel.h"

namespace ipt_fast::cpu {

at::Tensor focal_channel_attention(const at::Tensor& qkv, const at::Tensor& temperature, const at::Tensor& token_weight,
                                   const at::Tensor& top_weight, const at::Tensor& bottom_weight, int64_t num_heads,
                                   int64_t window_size, bool cyclic);

// -> the gradients of qkv and of the parameters in this order.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> focal_channel_attention_backward(
    const at::Tensor& grad, const at::Tensor& qkv, const at::Tensor& temperature, const at::Tensor& token_weight,
    const at::Tensor& top_weight, const at::Tensor& bottom_weight, int64_t num_heads, int64_t window_size, bool cyclic);

// `name` is what has the channels.
void check_heads(int64_t channels, int64_t num_heads, const char* name);

// The parameters of focal channel attention as its kernels read them, checked; `like` has the dtype of the images.
struct FocalParameters {
    FocalParameters(const at::Tensor& like, const at::Tensor& temperature, const at::Tensor& token_weight,
                    const at::Tensor& top_weight, const at::Tensor& bottom_weight, int64_t num_heads,
                    int64_t window_size, bool cyclic);

    at::Tensor scale, token_squares, top, bottom;
    int64_t scale_step, token_step;  // from the values of the first branch to the second's; 0 where they share them
};

// The groups of a map `x` of all heads' channels. Parameters and slots are still missing.
Groups focal_groups(const at::Tensor& x, int64_t num_heads, int64_t window_size, bool cyclic);

// Parameters of both branches, for Groups.
inline void set_branches(const float* (&branches)[2], const float* first, int64_t step) {
    branches[0] = first;
    branches[1] = first + step;
}

// The same with the parameters. The slots are still missing.
struct FocalGroups : FocalParameters {
    FocalGroups(const at::Tensor& x, const at::Tensor& temperature, const at::Tensor& token_weight,
                const at::Tensor& top_weight, const at::Tensor& bottom_weight, int64_t num_heads, int64_t window_size,
                bool cyclic);

    Groups groups;
};

}  // namespace ipt_fast::cpu
