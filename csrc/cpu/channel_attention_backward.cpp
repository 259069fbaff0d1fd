// Backward of channel_attention and focal_channel_attention: checks, work partition, registration.
#include <ATen/TensorOperators.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "channel_attention_backward_kernel.h"
#include "groups.h"
#include "tensor.h"

namespace ipt_fast::cpu {
namespace {

// The gradients of the parameters, as far as they are sums over the map.
struct Sums {
    at::Tensor scale;  // (heads), fp64
    at::Tensor maps;   // (4, heads, p, p), fp64; two branches only
};

// out (p, p) = the sums of (images, rows, columns) values over the windows of a branch.
void sum_windows(const Groups& g, int branch, const float* values, double* out) {
    const int64_t p = g.vertical.window, width = g.horizontal.size;
    for (int64_t row = 0; row < g.images * g.vertical.size; ++row) {
        double* const target = out + g.vertical.position(branch, row % g.vertical.size) * p;
        for (int64_t x = 0; x < width;) {
            const int64_t position = g.horizontal.position(branch, x), count = std::min(p - position, width - x);
            for (int64_t i = 0; i < count; ++i) {
                target[position + i] += values[row * width + x + i];
            }
            x += count;
        }
    }
}

// The three passes over a map; p lacks only the work space.
Sums run(ChannelAttentionBackwardParams& p) {
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
            pass(p, begin, end, space.at<float>(scratch) + at::get_thread_num() * p.scratch());
        });
    };
    for_all(blocks, kernel.gram);
    for_all(windows, kernel.attend);
    for_all(blocks, kernel.apply);

    const int64_t window = g.vertical.window;
    Sums sums{at::zeros({g.heads}, at::kDouble), at::zeros({maps, g.heads, window, maps ? window : 0}, at::kDouble)};
    double* const of_scale = sums.scale.mutable_data_ptr<double>();
    for (int64_t i = 0; i < windows; ++i) {
        of_scale[i / g.branches % g.heads] += p.grad_scale[i];
    }
    double* const of_maps = sums.maps.mutable_data_ptr<double>();
    at::parallel_for(0, maps * g.heads, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            // the token weights are laid out by each branch's windows, both merge weights by the unshifted ones
            sum_windows(g, i / g.heads == 1 ? 1 : 0, p.token_sums + i * map, of_maps + i * window * window);
        }
    });
    return sums;
}

at::Tensor like(const at::Tensor& gradient, const at::Tensor& parameter) {
    return gradient.to(parameter.scalar_type()).view(parameter.sizes());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> channel_attention_backward(
    const at::Tensor& grad_, const at::Tensor& q_, const at::Tensor& k_, const at::Tensor& v_,
    const at::Tensor& temperature, int64_t num_heads, std::optional<int64_t> window_size) {
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
    p.groups = windows.groups;
    p.q = pixels_of(q);
    p.k = pixels_of(k);
    p.v = pixels_of(v);
    p.grad = pixels_of(grad);
    p.grad_q = grad_q.mutable_data_ptr();
    p.grad_k = grad_k.mutable_data_ptr();
    p.grad_v = grad_v.mutable_data_ptr();
    p.grad_pixel = q.size(1);
    const Sums sums = run(p);
    return {grad_q, grad_k, grad_v, like(sums.scale, temperature)};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> focal_channel_attention_backward(
    const at::Tensor& grad_, const at::Tensor& qkv_, const at::Tensor& temperature, const at::Tensor& token_weight,
    const at::Tensor& top_weight, const at::Tensor& bottom_weight, int64_t num_heads, int64_t window_size) {
    check_image(qkv_, "qkv");
    const int64_t channels = attention_channels(qkv_);
    check_heads(channels, num_heads, "qkv / 3");
    check_tensor(grad_, "grad", {qkv_.size(0), channels, qkv_.size(2), qkv_.size(3)}, qkv_);
    const at::Tensor qkv = with_pixels(qkv_), grad = channels_last(grad_);
    const at::Tensor grad_qkv = empty_channels_last(qkv.sizes(), qkv);
    const FocalGroups focal(grad, temperature, token_weight, top_weight, bottom_weight, num_heads, window_size);
    ChannelAttentionBackwardParams p{};
    p.dtype = dtype_of(qkv);
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
    const at::Tensor alpha = temperature.to(at::kDouble).view({num_heads});
    const at::Tensor of_token = (sums.maps[0] + sums.maps[1]) * token_weight;
    return {grad_qkv, like(-sums.scale / (alpha * alpha), temperature), like(of_token, token_weight),
            like(sums.maps[2], top_weight), like(sums.maps[3], bottom_weight)};
}

TORCH_LIBRARY_IMPL(ipt_fast_cpu, CPU, m) {
    m.impl("channel_attention_backward", channel_attention_backward);
    m.impl("focal_channel_attention_backward", focal_channel_attention_backward);
}

}  // namespace ipt_fast::cpu
