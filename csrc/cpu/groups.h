// What the ATen sides of channel attention and of the focal attention layer share: the operators that the layer's
// backward is made of, checks, and the groups with the tensors that they point into.
#pragma once

#include <ATen/ops/reciprocal.h>
#include <ATen/ops/square.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "channel_attention_kernel.h"
#include "tensor.h"

namespace ipt_fast::cpu {

at::Tensor focal_channel_attention(const at::Tensor& qkv, const at::Tensor& temperature, const at::Tensor& token_weight,
                                   const at::Tensor& top_weight, const at::Tensor& bottom_weight, int64_t num_heads,
                                   int64_t window_size);

// -> the gradients of qkv and of the parameters in this order.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> focal_channel_attention_backward(
    const at::Tensor& grad, const at::Tensor& qkv, const at::Tensor& temperature, const at::Tensor& token_weight,
    const at::Tensor& top_weight, const at::Tensor& bottom_weight, int64_t num_heads, int64_t window_size);

inline void check_heads(int64_t channels, int64_t num_heads, const char* name) {
    TORCH_CHECK_VALUE(num_heads > 0 && channels % num_heads == 0, name, " has ", channels,
                      " channels, expected a multiple of num_heads (", num_heads, ")");
}

inline void check_per_head(const at::Tensor& parameter, const char* name, int64_t num_heads, const at::Tensor& like) {
    TORCH_CHECK_VALUE(parameter.numel() == num_heads, name, " has shape ", parameter.sizes(),
                      ", expected one value for each of ", num_heads, " heads");
    check_tensor(parameter, name, parameter.sizes(), like, true);
}

inline at::Tensor as_float(const at::Tensor& parameter) { return parameter.to(at::kFloat).contiguous(); }

// Groups of a map; the parameters and the slots are still missing.
inline Groups groups_of(int64_t images, int64_t channels, int64_t num_heads, const Axis& vertical,
                        const Axis& horizontal, int branches) {
    Groups g{};
    g.images = images;
    g.heads = num_heads;
    g.head_channels = channels / num_heads;
    g.depth = padded(g.head_channels);
    g.branches = branches;
    g.vertical = vertical;
    g.horizontal = horizontal;
    return g;
}

// The groups of channel attention of a map `x` of all heads' channels: its windows, or without a size the whole image,
// in at most kMostBlocks blocks of at least kLeastBlockPixels pixels.
struct WindowGroups {
    static constexpr int64_t kMostBlocks = 256;
    static constexpr int64_t kLeastBlockPixels = 512;

    WindowGroups(const at::Tensor& x, const at::Tensor& temperature, int64_t num_heads,
                 std::optional<int64_t> window_size) {
        TORCH_CHECK_VALUE(window_size.value_or(1) > 0, "window_size is ", *window_size, ", expected a positive number");
        check_per_head(temperature, "temperature", num_heads, x);
        scale = as_float(temperature);
        const int64_t height = x.size(2), width = x.size(3), pixels = height * width;
        // the order of the pixels of a whole image does not matter: take it as one row
        const bool whole = !window_size.has_value() || *window_size >= std::max(height, width);
        const Axis vertical = whole ? Axis::whole(1, 1) : Axis::windows_of(height, *window_size, 1);
        const Axis horizontal = whole ? Axis::whole(pixels, std::max(kLeastBlockPixels, pixels / kMostBlocks))
                                      : Axis::windows_of(width, *window_size, 1);
        groups = groups_of(x.size(0), x.size(1), num_heads, vertical, horizontal, 1);
        groups.scale = scale.const_data_ptr<float>();
    }

    at::Tensor scale;
    Groups groups;
};

// The groups of focal channel attention of a map `x` of all heads' channels, with the parameters in fp32.
struct FocalGroups {
    FocalGroups(const at::Tensor& x, const at::Tensor& temperature, const at::Tensor& token_weight,
                const at::Tensor& top_weight, const at::Tensor& bottom_weight, int64_t num_heads, int64_t window_size) {
        TORCH_CHECK_VALUE(window_size > 0, "window_size is ", window_size, ", expected a positive number");
        const int64_t map[] = {num_heads, window_size, window_size};
        check_per_head(temperature, "temperature", num_heads, x);
        check_tensor(token_weight, "token_weight", map, x, true);
        check_tensor(top_weight, "top_weight", map, x, true);
        check_tensor(bottom_weight, "bottom_weight", map, x, true);
        scale = at::reciprocal(as_float(temperature));
        token_squares = at::square(as_float(token_weight));
        top = as_float(top_weight);
        bottom = as_float(bottom_weight);
        groups = groups_of(x.size(0), x.size(1), num_heads, Axis::windows_of(x.size(2), window_size, 2),
                           Axis::windows_of(x.size(3), window_size, 2), 2);
        groups.token_squares = token_squares.const_data_ptr<float>();
        groups.merge[0] = top.const_data_ptr<float>();
        groups.merge[1] = bottom.const_data_ptr<float>();
        groups.scale = scale.const_data_ptr<float>();
    }

    at::Tensor scale, token_squares, top, bottom;
    Groups groups;
};

// x where its pixels lie at one distance and its channels are contiguous (a part of a wider channels-last map does),
// else a channels-last copy.
inline at::Tensor with_pixels(const at::Tensor& x) {
    const int64_t pixel = x.stride(3), row = x.size(3) * pixel;
    const bool dense = pixel >= x.size(1) && x.strides() == at::IntArrayRef({x.size(2) * row, 1, row, pixel});
    return dense ? x : channels_last(x);
}

inline Pixels pixels_of(const at::Tensor& x) { return {x.const_data_ptr(), x.stride(3)}; }

}  // namespace ipt_fast::cpu
