// channel_attention and its backward: checks, groups, work partition, registration. The arithmetic is in
// channel_attention_kernel.cpp and channel_attention_backward_kernel.cpp.
#include "channel_attention.h"

#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "level.h"
#include "matrix_unit.h"
#include "work_space.h"

namespace ipt_fast::cpu {

void check_per_head(const at::Tensor& parameter, const char* name, int64_t num_heads, const at::Tensor& like) {
    TORCH_CHECK_VALUE(parameter.numel() == num_heads, name, " must have one value for each of ", num_heads,
                      " heads; got shape ", parameter.sizes());
    check_tensor(parameter, name, parameter.sizes(), like, true);
}

void check_heads(int64_t channels, int64_t num_heads, const char* name) {
    TORCH_CHECK_VALUE(num_heads > 0 && channels % num_heads == 0, "num_heads must divide the ", channels,
                      " channels of ", name, "; got ", num_heads);
}

Groups groups_of(const at::Tensor& x, int64_t num_heads, const Axis& vertical, const Axis& horizontal, int branches) {
    Groups g{};
    g.images = x.size(0);
    g.heads = num_heads;
    g.head_channels = x.size(1) / num_heads;
    g.depth = padded(g.head_channels);
    g.branches = branches;
    g.vertical = vertical;
    g.horizontal = horizontal;
    g.dilation = 1;
    g.height = x.size(2);
    g.width = x.size(3);
    return g;
}

GroupKind::GroupKind(at::OptionalIntArrayRef window_size, std::optional<int64_t> dilation_, bool overlapping_)
    : windows(window_size.has_value()),
      rows(windows ? (*window_size)[0] : 0),
      columns(windows ? (*window_size)[1] : 0),
      dilation(dilation_.value_or(1)),
      overlapping(overlapping_) {
    TORCH_CHECK_VALUE(!windows || (rows > 0 && columns > 0), "window_size must be at least 1; got ", rows, " and ",
                      columns);
    TORCH_CHECK_VALUE(dilation > 0, "dilation must be at least 1; got ", dilation);
    TORCH_CHECK_VALUE(!windows || !dilation_.has_value(), "dilation must be None beside window_size; got ", dilation);
    TORCH_CHECK_VALUE(windows || !overlapping, "overlapping must be False where there is no window_size");
}

namespace {

// An axis in at most this many parts, of at least `part` pixels.
Axis in_parts(int64_t size, int64_t part) {
    constexpr int64_t kMostParts = 16;
    return Axis::whole(size, std::max(part, round_up((size + kMostParts - 1) / kMostParts, kTileRows)));
}

}  // namespace

Groups channel_groups(const at::Tensor& x, int64_t num_heads, const GroupKind& kind) {
    const int64_t height = x.size(2), width = x.size(3);
    if (kind.whole(x) || kind.dilation > 1) {
        const int64_t step = std::min(kind.dilation, std::max(height, width));  // more would leave more groups empty
        const Axis vertical = in_parts((height + step - 1) / step, kBlockRows);
        const Axis horizontal = in_parts((width + step - 1) / step, kBlockColumns);
        Groups g = groups_of(x, num_heads, vertical, horizontal, 1);
        g.images *= step * step;
        g.dilation = step;
        return g;
    }
    const auto cut =
        kind.overlapping ? Axis::overlapping : +[](int64_t size, int64_t p) { return Axis::windows_of(size, p, 1); };
    return groups_of(x, num_heads, cut(height, kind.rows), cut(width, kind.columns), 1);
}

void run(ChannelAttentionParams& p) {
    Groups& g = p.groups;
    const ChannelAttentionKernels& kernel = kernels_in_use<ChannelAttentionKernels>();
    const int64_t most = std::max({gram_scratch(g), attend_scratch(g), apply_scratch(g) + kTileTokens * g.depth});
    const int64_t each = round_up(most, kChannelPad);
    WorkSpace space;
    const int64_t slots = space.add(g.slots_bytes()), attention = space.add(g.attention_bytes());
    const int64_t scratch = space.add(at::get_num_threads() * each * sizeof(float));
    space.allocate();
    g.slots = space.at<float>(slots);
    g.attention = space.at<float>(attention);
    const auto for_all = [&](int64_t count, const auto& pass) {
        at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
            const ProductScope scope{p.brgemm};
            pass(begin, end, space.at<float>(scratch) + at::get_thread_num() * each);
        });
    };
    for_all(g.blocks() * g.heads, [&](auto... share) { kernel.gram(p, share...); });
    for_all(g.windows() * g.heads * g.branches, [&](auto... share) { kernel.attend(g, share...); });
    if (g.overlapping()) {
        for_all(g.blocks() * g.heads, [&](int64_t begin, int64_t end, float*) { kernel.average(g, begin, end); });
    }
    for_all(g.blocks() * g.heads, [&](auto... share) { kernel.apply(p, share...); });
}

namespace {

// The groups of channel attention, and what its kernels read of the parameters.
struct ChannelGroups {
    static constexpr int64_t kMostBlocks = 256;
    static constexpr int64_t kLeastBlockPixels = 512;

    ChannelGroups(const at::Tensor& x, const at::Tensor& temperature, int64_t num_heads, const GroupKind& kind) {
        check_per_head(temperature, "temperature", num_heads, x);
        scale = temperature.to(at::kFloat).contiguous();
        groups = channel_groups(x, num_heads, kind);
        if (kind.whole(x)) {  // the order of the pixels does not matter: take them as one row
            const int64_t pixels = groups.height * groups.width;
            groups.vertical = Axis::whole(1, 1);
            groups.horizontal = Axis::whole(pixels, std::max(kLeastBlockPixels, pixels / kMostBlocks));
            groups.height = 1;
            groups.width = pixels;
        }
        groups.scale[0] = scale.const_data_ptr<float>();
    }

    at::Tensor scale;
    Groups groups;
};

void check_maps(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, int64_t num_heads) {
    check_image(q, "q");
    check_tensor(k, "k", q.sizes(), q);
    check_tensor(v, "v", q.sizes(), q);
    check_heads(q.size(1), num_heads, "q");
}

}  // namespace

at::Tensor channel_attention(const at::Tensor& q_, const at::Tensor& k_, const at::Tensor& v_,
                             const at::Tensor& temperature, int64_t num_heads, const GroupKind& kind) {
    check_maps(q_, k_, v_, num_heads);
    const at::Tensor q = with_pixels(q_), k = with_pixels(k_), v = with_pixels(v_);
    const at::Tensor out = empty_channels_last(q.sizes(), q);
    const ChannelGroups channel(q, temperature, num_heads, kind);
    ChannelAttentionParams params{};
    params.dtype = dtype_of(q);
    params.brgemm = brgemm_of(params.dtype);
    params.groups = channel.groups;
    params.q = pixels_of(q);
    params.k = pixels_of(k);
    params.v = pixels_of(v);
    params.out = out.mutable_data_ptr();
    run(params);
    return out;
}

namespace {

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

}  // namespace

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

at::Tensor channel_attention_backward(const at::Tensor& grad_, const at::Tensor& q_, const at::Tensor& k_,
                                      const at::Tensor& v_, const at::Tensor& temperature, int64_t num_heads,
                                      const GroupKind& kind, const at::Tensor& grad_q, const at::Tensor& grad_k,
                                      const at::Tensor& grad_v) {
    check_maps(q_, k_, v_, num_heads);
    check_tensor(grad_, "grad", q_.sizes(), q_);
    const at::Tensor q = with_pixels(q_), k = with_pixels(k_), v = with_pixels(v_), grad = channels_last(grad_);
    const ChannelGroups channel(q, temperature, num_heads, kind);
    ChannelAttentionBackwardParams p{};
    p.dtype = dtype_of(q);
    p.brgemm = brgemm_of(p.dtype);
    p.groups = channel.groups;
    p.q = pixels_of(q);
    p.k = pixels_of(k);
    p.v = pixels_of(v);
    p.grad = pixels_of(grad);
    p.grad_q = grad_q.mutable_data_ptr();
    p.grad_k = grad_k.mutable_data_ptr();
    p.grad_v = grad_v.mutable_data_ptr();
    p.grad_pixel = grad_q.stride(3);
    return like(run(p).scale, temperature);
}

TORCH_LIBRARY_IMPL(ipt_fast_cpu, CPU, m) {
    m.impl(
        "channel_attention",
        [](const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& temperature,
           int64_t num_heads, at::OptionalIntArrayRef window_size, std::optional<int64_t> dilation, bool overlapping) {
            return channel_attention(q, k, v, temperature, num_heads, {window_size, dilation, overlapping});
        });
    m.impl("channel_attention_backward",
           [](const at::Tensor& grad, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
              const at::Tensor& temperature, int64_t num_heads, at::OptionalIntArrayRef window_size,
              std::optional<int64_t> dilation, bool overlapping) {
               check_image(q, "q");
               const auto like_q = [&] { return empty_channels_last(q.sizes(), q); };
               const at::Tensor grad_q = like_q(), grad_k = like_q(), grad_v = like_q();
               const at::Tensor grad_temperature = channel_attention_backward(
                   grad, q, k, v, temperature, num_heads, {window_size, dilation, overlapping}, grad_q, grad_k, grad_v);
               return std::tuple(grad_q, grad_k, grad_v, grad_temperature);
           });
}

}  // namespace ipt_fast::cpu
