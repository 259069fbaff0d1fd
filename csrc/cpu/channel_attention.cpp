// channel_attention, focal_channel_attention and their backwards: checks, work partition, registration. The arithmetic
// is in channel_attention_kernel.cpp and channel_attention_backward_kernel.cpp.
#include "channel_attention.h"

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/reciprocal.h>
#include <ATen/ops/square.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "level.h"
#include "matrix_unit.h"
#include "work_space.h"

namespace ipt_fast::cpu {
namespace {

void check_per_head(const at::Tensor& parameter, const char* name, int64_t num_heads, const at::Tensor& like) {
    TORCH_CHECK_VALUE(parameter.numel() == num_heads, name, " must have one value for each of ", num_heads,
                      " heads; got shape ", parameter.sizes());
    check_tensor(parameter, name, parameter.sizes(), like, true);
}

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

// Groups of a map; the parameters and the slots are still missing.
Groups groups_of(int64_t images, int64_t channels, int64_t num_heads, const Axis& vertical, const Axis& horizontal,
                 int branches) {
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
                 at::OptionalIntArrayRef window_size) {
        check_per_head(temperature, "temperature", num_heads, x);
        scale = as_float(temperature);
        const int64_t height = x.size(2), width = x.size(3), pixels = height * width;
        // the order of the pixels of a whole image does not matter: take it as one row
        const bool whole = !window_size.has_value() || ((*window_size)[0] >= height && (*window_size)[1] >= width);
        const Axis vertical = whole ? Axis::whole(1, 1) : Axis::windows_of(height, (*window_size)[0], 1);
        const Axis horizontal = whole ? Axis::whole(pixels, std::max(kLeastBlockPixels, pixels / kMostBlocks))
                                      : Axis::windows_of(width, (*window_size)[1], 1);
        groups = groups_of(x.size(0), x.size(1), num_heads, vertical, horizontal, 1);
        groups.scale[0] = scale.const_data_ptr<float>();
    }

    at::Tensor scale;
    Groups groups;
};

}  // namespace

void check_heads(int64_t channels, int64_t num_heads, const char* name) {
    TORCH_CHECK_VALUE(num_heads > 0 && channels % num_heads == 0, "num_heads must divide the ", channels,
                      " channels of ", name, "; got ", num_heads);
}

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
    Groups g = groups_of(x.size(0), x.size(1), num_heads, Axis::windows_of(x.size(2), window_size, 2),
                         Axis::windows_of(x.size(3), window_size, 2), 2);
    g.inner = !cyclic;
    return g;
}

FocalGroups::FocalGroups(const at::Tensor& x, const at::Tensor& temperature, const at::Tensor& token_weight,
                         const at::Tensor& top_weight, const at::Tensor& bottom_weight, int64_t num_heads,
                         int64_t window_size, bool cyclic)
    : FocalParameters(x, temperature, token_weight, top_weight, bottom_weight, num_heads, window_size, cyclic),
      groups(focal_groups(x, num_heads, window_size, cyclic)) {
    set_branches(groups.scale, scale.const_data_ptr<float>(), scale_step);
    set_branches(groups.token_squares, token_squares.const_data_ptr<float>(), token_step);
    groups.merge[0] = top.const_data_ptr<float>();
    groups.merge[1] = bottom.const_data_ptr<float>();
}

namespace {

// The three passes over a map; p lacks only the slots.
void forward(ChannelAttentionParams& p) {
    Groups& g = p.groups;
    const ChannelAttentionKernels& kernel = kernels_in_use<ChannelAttentionKernels>();
    const int64_t most = std::max({gram_scratch(g), attend_scratch(g), apply_scratch(g) + kTileTokens * g.depth});
    const int64_t each = round_up(most, kChannelPad);
    WorkSpace space;
    const int64_t slots = space.add(g.slots_bytes());
    const int64_t scratch = space.add(at::get_num_threads() * each * sizeof(float));
    space.allocate();
    g.slots = space.at<float>(slots);
    const auto for_all = [&](int64_t count, const auto& pass) {
        at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
            const ProductScope scope{p.brgemm};
            pass(begin, end, space.at<float>(scratch) + at::get_thread_num() * each);
        });
    };
    for_all(g.blocks() * g.heads, [&](auto... share) { kernel.gram(p, share...); });
    for_all(g.windows() * g.heads * g.branches, [&](auto... share) { kernel.attend(g, share...); });
    for_all(g.blocks() * g.heads, [&](auto... share) { kernel.apply(p, share...); });
}

at::Tensor channel_attention(const at::Tensor& q_, const at::Tensor& k_, const at::Tensor& v_,
                             const at::Tensor& temperature, int64_t num_heads, at::OptionalIntArrayRef window_size,
                             std::optional<int64_t> dilation, bool overlapping) {
    TORCH_CHECK_NOT_IMPLEMENTED(!dilation.has_value() && !overlapping, "dilated and overlapping groups");
    check_image(q_, "q");
    check_tensor(k_, "k", q_.sizes(), q_);
    check_tensor(v_, "v", q_.sizes(), q_);
    check_heads(q_.size(1), num_heads, "q");
    const at::Tensor q = with_pixels(q_), k = with_pixels(k_), v = with_pixels(v_);
    const at::Tensor out = empty_channels_last(q.sizes(), q);
    const WindowGroups windows(q, temperature, num_heads, window_size);
    ChannelAttentionParams params{};
    params.dtype = dtype_of(q);
    params.brgemm = brgemm_of(params.dtype);
    params.groups = windows.groups;
    params.q = pixels_of(q);
    params.k = pixels_of(k);
    params.v = pixels_of(v);
    params.out = out.mutable_data_ptr();
    forward(params);
    return out;
}

// The gradients of the parameters, as far as they are sums over the map.
struct Sums {
    at::Tensor scale;  // (branches, heads), fp64
    at::Tensor maps;   // (4, heads, p, p), fp64; two branches only
};

// out (p, p) = the sums of (images, rows, columns) values over the windows of a branch, or what of them is `inner`.
void sum_windows(const Groups& g, int branch, bool inner, const float* values, double* out) {
    const Axis &vertical = g.vertical, &horizontal = g.horizontal;
    const int64_t p = vertical.window, height = vertical.size, width = horizontal.size;
    const int64_t top = inner ? vertical.inner_begin() : 0, bottom = inner ? vertical.inner_end() : height;
    const int64_t left = inner ? horizontal.inner_begin() : 0, right = inner ? horizontal.inner_end() : width;
    for (int64_t image = 0; image < g.images; ++image) {
        for (int64_t y = top; y < bottom; ++y) {
            const float* const row = values + (image * height + y) * width;
            double* const target = out + vertical.position(branch, y) * p;
            for (int64_t x = left; x < right;) {
                const int64_t position = horizontal.position(branch, x), count = std::min(p - position, right - x);
                for (int64_t i = 0; i < count; ++i) {
                    target[position + i] += row[x + i];
                }
                x += count;
            }
        }
    }
}

// The three passes over a map; p lacks only the work space.
Sums backward(ChannelAttentionBackwardParams& p) {
    const Groups& g = p.groups;
    const ChannelAttentionBackwardKernels& kernel = kernels_in_use<ChannelAttentionBackwardKernels>();
    const int64_t blocks = g.blocks() * g.heads, windows = g.windows() * g.heads * g.branches;
    const int64_t maps = g.branches == 2 ? 4 : 0, map = g.images * g.vertical.size * g.horizontal.size;
    const auto floats = [](int64_t count) { return count * static_cast<int64_t>(sizeof(float)); };
    WorkSpace space;
    const int64_t slots = space.add(floats(blocks * p.slot_size()));
    const int64_t matrices = space.add(floats(windows * p.matrices_size()));
    const int64_t grad_scale = space.add(windows * static_cast<int64_t>(sizeof(double)));
    const int64_t token_sums = space.add(floats(maps * g.heads * map));
    const int64_t scratch = space.add(floats(at::get_num_threads() * p.scratch()));
    space.allocate();
    p.slots = space.at<float>(slots);
    p.matrices = space.at<float>(matrices);
    p.grad_scale = space.at<double>(grad_scale);
    p.token_sums = space.at<float>(token_sums);
    const auto for_all = [&](int64_t count, const auto& pass) {
        at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
            const ProductScope scope{p.brgemm};
            pass(p, begin, end, space.at<float>(scratch) + at::get_thread_num() * p.scratch());
        });
    };
    for_all(blocks, kernel.gram);
    for_all(windows, kernel.attend);
    for_all(blocks, kernel.apply);

    const int64_t window = g.vertical.window;
    Sums sums{at::zeros({g.branches, g.heads}, at::kDouble),
              at::zeros({maps, g.heads, window, maps ? window : 0}, at::kDouble)};
    double* const of_scale = sums.scale.mutable_data_ptr<double>();
    for (int64_t i = 0; i < windows; ++i) {
        of_scale[i % g.branches * g.heads + i / g.branches % g.heads] += p.grad_scale[i];
    }
    double* const of_maps = sums.maps.mutable_data_ptr<double>();
    at::parallel_for(0, maps * g.heads, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            // the token weights are laid out by each branch's windows, both merge weights by the unshifted ones
            sum_windows(g, i / g.heads == 1 ? 1 : 0, g.inner && i >= g.heads, p.token_sums + i * map,
                        of_maps + i * window * window);
        }
    });
    return sums;
}

at::Tensor like(const at::Tensor& gradient, const at::Tensor& parameter) {
    return gradient.to(parameter.scalar_type()).view(parameter.sizes());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> channel_attention_backward(
    const at::Tensor& grad_, const at::Tensor& q_, const at::Tensor& k_, const at::Tensor& v_,
    const at::Tensor& temperature, int64_t num_heads, at::OptionalIntArrayRef window_size,
    std::optional<int64_t> dilation, bool overlapping) {
    TORCH_CHECK_NOT_IMPLEMENTED(!dilation.has_value() && !overlapping, "dilated and overlapping groups");
    check_image(q_, "q");
    check_tensor(k_, "k", q_.sizes(), q_);
    check_tensor(v_, "v", q_.sizes(), q_);
    check_tensor(grad_, "grad", q_.sizes(), q_);
    check_heads(q_.size(1), num_heads, "q");
    const at::Tensor q = with_pixels(q_), k = with_pixels(k_), v = with_pixels(v_), grad = channels_last(grad_);
    const at::Tensor grad_q = empty_channels_last(q.sizes(), q), grad_k = empty_channels_last(q.sizes(), q);
    const at::Tensor grad_v = empty_channels_last(q.sizes(), q);
    const WindowGroups windows(q, temperature, num_heads, window_size);
    ChannelAttentionBackwardParams p{};
    p.dtype = dtype_of(q);
    p.brgemm = brgemm_of(p.dtype);
    p.groups = windows.groups;
    p.q = pixels_of(q);
    p.k = pixels_of(k);
    p.v = pixels_of(v);
    p.grad = pixels_of(grad);
    p.grad_q = grad_q.mutable_data_ptr();
    p.grad_k = grad_k.mutable_data_ptr();
    p.grad_v = grad_v.mutable_data_ptr();
    p.grad_pixel = q.size(1);
    const Sums sums = backward(p);
    return {grad_q, grad_k, grad_v, like(sums.scale, temperature)};
}

}  // namespace

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
    forward(params);
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
    const Sums sums = backward(p);
    // a parameter of both branches gets the sum of their gradients
    const at::Tensor alpha = temperature.to(at::kDouble), of_scale = focal.scale_step ? sums.scale : sums.scale.sum(0);
    const at::Tensor of_tokens = sums.maps.narrow(0, 0, 2), of_token = focal.token_step ? of_tokens : of_tokens.sum(0);
    return {grad_qkv, like(-of_scale / (alpha * alpha), temperature), like(of_token * token_weight, token_weight),
            like(sums.maps[2], top_weight), like(sums.maps[3], bottom_weight)};
}

TORCH_LIBRARY_IMPL(ipt_fast_cpu, CPU, m) {
    m.impl("channel_attention", channel_attention);
    m.impl("channel_attention_backward", channel_attention_backward);
    m.impl("focal_channel_attention", focal_channel_attention);
    m.impl("focal_channel_attention_backward", focal_channel_attention_backward);
}

}  // namespace ipt_fast::cpu
