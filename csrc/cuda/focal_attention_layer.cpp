#include "focal_attention_layer.cuh"

#include <algorithm>

#include "bindings.cuh"
#include "common/windows.h"

namespace ipt_fast::cuda {
namespace {

constexpr int64_t kSplitTokens = 1024;  // of a block of the map for each thread block, while these are at most
constexpr int64_t kMostSplits = 128;
constexpr int64_t kMostWindow = 1 << 14;  // as in ipt_fast/ops/_cuda.py
constexpr int64_t kMostRows = 1 << 24;    // and columns, and images

FocalAxis axis(int64_t size, int64_t window) {
    const Axis cut = Axis::windows_of(size, window, 2);
    return {(int)size, (int)window, (int)cut.part, (int)cut.parts, (int)cut.windows(), (int)cut.blocks()};
}

int splits(int64_t height, int64_t width, int64_t window) {
    const int64_t side = window - window / 2, tokens = std::min(side, height) * std::min(side, width);
    return (int)std::clamp<int64_t>((tokens + kSplitTokens - 1) / kSplitTokens, 1, kMostSplits);
}

Tensor focal_attention_layer_forward(Tensor x, Tensor norm_weight, OptionalTensor norm_bias, Tensor qkv_weight,
                                     Tensor depthwise_weight, Tensor project_weight, Tensor temperature,
                                     Tensor token_weight, Tensor top_weight, Tensor bottom_weight, int64_t num_heads,
                                     int64_t window_size, double eps, bool centered, bool tf32) {
    check_image(x, "x");
    const int64_t channels = x.size(1), height = x.size(2), width = x.size(3);
    STD_TORCH_CHECK(channels == 32 || channels == 48 || channels == 64 || channels == 96,
                    "x must have 32, 48, 64 or 96 channels; got ", channels);
    STD_TORCH_CHECK(num_heads > 0 && channels % num_heads == 0, "num_heads must divide the ", channels,
                    " channels of x; got ", num_heads);
    const int64_t depth = channels / num_heads;
    STD_TORCH_CHECK(focal_layer_takes(channels, depth), "heads must have 32 or 48 channels; got ", depth);
    STD_TORCH_CHECK(window_size > 0 && window_size <= kMostWindow, "window_size must be from 1 to ", kMostWindow,
                    "; got ", window_size);
    STD_TORCH_CHECK(height <= kMostRows && width <= kMostRows && x.size(0) <= kMostRows, "x must have at most ",
                    kMostRows, " images, rows and columns; got ", x.size(0), " of ", height, " x ", width);
    check_small(norm_weight, "norm_weight", {channels}, x, norm_weight);
    if (norm_bias.has_value()) {
        check_small(*norm_bias, "norm_bias", {channels}, x, norm_weight);
    }
    check_tensor(qkv_weight, "qkv_weight", {3 * channels, channels, 1, 1}, x);
    check_tensor(depthwise_weight, "depthwise_weight", {3 * channels, 1, 3, 3}, x);
    check_tensor(project_weight, "project_weight", {channels, channels, 1, 1}, x);
    check_small(temperature, "temperature", {num_heads}, x, norm_weight);
    check_small(token_weight, "token_weight", {num_heads, window_size, window_size}, x, norm_weight);
    check_small(top_weight, "top_weight", {num_heads, window_size, window_size}, x, norm_weight);
    check_small(bottom_weight, "bottom_weight", {num_heads, window_size, window_size}, x, norm_weight);
    check_device({&x, &norm_weight, norm_bias.has_value() ? &*norm_bias : &x, &qkv_weight, &depthwise_weight,
                  &project_weight, &temperature, &token_weight, &top_weight, &bottom_weight});

    Tensor out = new_image(x, channels);
    FocalAttentionLayerArguments p = {};
    p.x = x.data_ptr();
    p.out = out.data_ptr();
    p.qkv_weight = qkv_weight.data_ptr();
    p.depthwise_weight = depthwise_weight.data_ptr();
    p.project_weight = project_weight.data_ptr();
    p.norm_weight = norm_weight.data_ptr();
    p.norm_bias = values(norm_bias);
    p.temperature = temperature.data_ptr();
    p.token_weight = token_weight.data_ptr();
    p.top_weight = top_weight.data_ptr();
    p.bottom_weight = bottom_weight.data_ptr();
    p.narrow = norm_weight.scalar_type() != ScalarType::Float;
    p.images = (int)x.size(0);
    p.height = (int)height;
    p.width = (int)width;
    p.channels = (int)channels;
    p.heads = (int)num_heads;
    p.vertical = axis(height, window_size);
    p.horizontal = axis(width, window_size);
    p.splits = splits(height, width, window_size);
    p.eps = (float)eps;
    p.centered = centered;
    p.tf32 = tf32;
    const int64_t slots = focal_blocks(p) * num_heads * focal_slot((int)depth);
    // Before any of it is counted in 32 bits.
    STD_TORCH_CHECK(focal_blocks(p) * num_heads <= INT32_MAX && focal_matrices(p) <= INT32_MAX, "x must need at most ",
                    INT32_MAX, " attention matrices; got ", focal_matrices(p));
    // Two values of 16 bits, or one, to a float; the slots are multiples of 16 bytes.
    const int64_t matrices = focal_matrices(p) * depth * depth;
    const int64_t attention = x.scalar_type() == ScalarType::Float ? matrices : matrices / 2;
    Tensor workspace = new_tensor(x, {slots + attention}, ScalarType::Float);
    p.slots = values<float>(workspace);
    p.attention = p.slots + slots;
    const Device device(x);
    with_type(x, [&](auto type) { focal_attention_layer<decltype(type)>(p, device.stream); });
    return out;
}

}  // namespace
}  // namespace ipt_fast::cuda

STABLE_TORCH_LIBRARY_IMPL(ipt_fast_cuda, CompositeExplicitAutograd, m) {
    m.impl("focal_attention_layer", TORCH_BOX(&ipt_fast::cuda::focal_attention_layer_forward));
}
