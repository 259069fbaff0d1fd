// Channel attention, focal channel attention and their gradients, which the layers' backwards are made of, and what the
// layers share with them.
#pragma once

#include <optional>
#include <tuple>

#include "arguments.h"
#include "channel_attention_kernel.h"

namespace ipt_fast::cpu {

// `name` is what has the channels.
void check_heads(int64_t channels, int64_t num_heads, const char* name);
void check_per_head(const at::Tensor& parameter, const char* name, int64_t num_heads, const at::Tensor& like);

// Groups of a map `x` of all heads' channels. Parameters and slots are missing.
Groups groups_of(const at::Tensor& x, int64_t num_heads, const Axis& vertical, const Axis& horizontal, int branches);

// Which pixels are a group of channel attention.
struct GroupKind {
    GroupKind() = default;
    // Checks the arguments of an operator.
    GroupKind(at::OptionalIntArrayRef window_size, std::optional<int64_t> dilation, bool overlapping);

    bool windows;           // or the whole image, or the pixels of a dilation
    int64_t rows, columns;  // of a window
    int64_t dilation;       // 1: none
    bool overlapping;

    // Whether all of an image of x is one group.
    bool whole(const at::Tensor& x) const {
        return dilation == 1 && (!windows || (rows >= x.size(2) && columns >= x.size(3)));
    }
};

// Blocks of an image that is one group, in pixels; in large ones more.
constexpr int64_t kBlockRows = 16, kBlockColumns = 32;

// The groups of a map `x` of all heads' channels. Parameters and slots are missing.
Groups channel_groups(const at::Tensor& x, int64_t num_heads, const GroupKind& kind);

at::Tensor channel_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                             const at::Tensor& temperature, int64_t num_heads, const GroupKind& kind);

// Writes the gradients of q, k and v, parts of one map or maps of the same size. -> the gradient of the temperature.
at::Tensor channel_attention_backward(const at::Tensor& grad, const at::Tensor& q, const at::Tensor& k,
                                      const at::Tensor& v, const at::Tensor& temperature, int64_t num_heads,
                                      const GroupKind& kind, const at::Tensor& grad_q, const at::Tensor& grad_k,
                                      const at::Tensor& grad_v);

at::Tensor focal_channel_attention(const at::Tensor& qkv, const at::Tensor& temperature, const at::Tensor& token_weight,
                                   const at::Tensor& top_weight, const at::Tensor& bottom_weight, int64_t num_heads,
                                   int64_t window_size, bool cyclic);

// -> the gradients of qkv and of the parameters in this order.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> focal_channel_attention_backward(
    const at::Tensor& grad, const at::Tensor& qkv, const at::Tensor& temperature, const at::Tensor& token_weight,
    const at::Tensor& top_weight, const at::Tensor& bottom_weight, int64_t num_heads, int64_t window_size, bool cyclic);

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

// The passes over a map, forward; p lacks only the work space.
void run(ChannelAttentionParams& p);

// The gradients of the parameters, as far as they are sums over the map.
struct Sums {
    at::Tensor scale;  // (branches, heads), fp64
    at::Tensor maps;   // (4, heads, p, p), fp64; two branches only
};

// The passes over a map, backward; p lacks only the work space.
Sums run(ChannelAttentionBackwardParams& p);

// A parameter's gradient in its shape and dtype.
inline at::Tensor like(const at::Tensor& gradient, const at::Tensor& parameter) {
    return gradient.to(parameter.scalar_type()).view(parameter.sizes());
}

}  // namespace ipt_fast::cpu
