// channel_attention and focal_channel_attention: checks, work partition, registration.
#include <torch/library.h>

#include <algorithm>
#include <optional>

#include "channel_attention_kernel.h"
#include "groups.h"
#include "tensor.h"

namespace ipt_fast::cpu {
namespace {

// The three passes over a map; p lacks only the slots.
void run(ChannelAttentionParams& p) {
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
            pass(begin, end, space.at<float>(scratch) + at::get_thread_num() * each);
        });
    };
    for_all(g.blocks() * g.heads, [&](auto... share) { kernel.gram(p, share...); });
    for_all(g.windows() * g.heads * g.branches, [&](auto... share) { kernel.attend(g, share...); });
    for_all(g.blocks() * g.heads, [&](auto... share) { kernel.apply(p, share...); });
}

at::Tensor channel_attention(const at::Tensor& q_, const at::Tensor& k_, const at::Tensor& v_,
                             const at::Tensor& temperature, int64_t num_heads, std::optional<int64_t> window_size) {
    check_image(q_, "q");
    check_tensor(k_, "k", q_.sizes(), q_);
    check_tensor(v_, "v", q_.sizes(), q_);
    check_heads(q_.size(1), num_heads, "q");
    const at::Tensor q = with_pixels(q_), k = with_pixels(k_), v = with_pixels(v_);
    const at::Tensor out = empty_channels_last(q.sizes(), q);
    const WindowGroups windows(q, temperature, num_heads, window_size);
    ChannelAttentionParams params{};
    params.dtype = dtype_of(q);
    params.groups = windows.groups;
    params.q = pixels_of(q);
    params.k = pixels_of(k);
    params.v = pixels_of(v);
    params.out = out.mutable_data_ptr();
    run(params);
    return out;
}

}  // namespace

at::Tensor focal_channel_attention(const at::Tensor& qkv_, const at::Tensor& temperature,
                                   const at::Tensor& token_weight, const at::Tensor& top_weight,
                                   const at::Tensor& bottom_weight, int64_t num_heads, int64_t window_size) {
    check_image(qkv_, "qkv");
    const int64_t channels = attention_channels(qkv_);
    check_heads(channels, num_heads, "qkv / 3");
    const at::Tensor qkv = with_pixels(qkv_);
    const at::Tensor out = empty_channels_last({qkv.size(0), channels, qkv.size(2), qkv.size(3)}, qkv);
    const FocalGroups focal(out, temperature, token_weight, top_weight, bottom_weight, num_heads, window_size);
    ChannelAttentionParams params{};
    params.dtype = dtype_of(qkv);
    params.groups = focal.groups;
    const auto part = [&](int64_t index) { return pixels_of(qkv.narrow(1, index * channels, channels)); };
    params.q = part(0);
    params.k = part(1);
    params.v = part(2);
    params.out = out.mutable_data_ptr();
    run(params);
    return out;
}

TORCH_LIBRARY_IMPL(ipt_fast_cpu, CPU, m) {
    m.impl("channel_attention", channel_attention);
    m.impl("focal_channel_attention", focal_channel_attention);
}

}  // namespace ipt_fast::cpu
