// Attention inside groups of pixels and its gradient: checks and work partition. The arithmetic is in
// group_attention_kernel.cpp and group_attention_backward_kernel.cpp.
#include "group_attention.h"

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>

#include "level.h"
#include "matrix_unit.h"
#include "work_space.h"

namespace ipt_fast::cpu {
namespace {

// Fewer FLOP than this are not worth a thread.
constexpr int64_t kGrain = 1 << 20;

int64_t area(const std::array<int64_t, 2>& size) { return size[0] * size[1]; }

// A table's rows and columns of relative positions.
std::array<int64_t, 2> offsets(const AttentionOptions& o) {
    return {o.window[0] + o.keys[0] - 1, o.window[1] + o.keys[1] - 1};
}

bool is_table(const at::Tensor& bias) { return bias.dim() == 2; }

// A head's table, the offsets of a row side by side.
ScoreBiases table_layout(const AttentionOptions& o) {
    const auto [rows, columns] = offsets(o);
    const int64_t row = columns + kChannelPad;
    return {nullptr, round_up(rows * row, kChannelPad), (o.keys[0] - 1) * row + o.keys[1] - 1, row, -row, -1};
}

// A head's biases, those of a key side by side.
ScoreBiases dense_layout(const AttentionOptions& o) {
    const int64_t row = padded(area(o.window));
    return {nullptr, area(o.keys) * row + kChannelPad, 0, o.window[1], o.keys[1] * row, row};
}

// The bias's own elements among `values` (..., heads, layout.size), laid out so: of a table (..., heads, rows,
// columns), of dense biases (..., heads, queries, keys).
at::Tensor elements(const at::Tensor& values, const AttentionOptions& o, bool table) {
    const auto [rows, columns] = offsets(o);
    const int64_t count = table ? rows : area(o.keys), width = table ? columns : area(o.window);
    const int64_t row = table ? columns + kChannelPad : padded(width);
    const at::Tensor matrix = values.narrow(-1, 0, count * row).unflatten(-1, {count, row}).narrow(-1, 0, width);
    return table ? matrix : matrix.transpose(-1, -2);
}

// (heads, queries, keys) of a table (rows, heads).
at::Tensor dense_of(const at::Tensor& table, const AttentionOptions& o) {
    const auto along = [&](int axis) {
        const at::Tensor queries = at::arange(o.window[axis], at::kLong), keys = at::arange(o.keys[axis], at::kLong);
        return queries.unsqueeze(1) - keys.unsqueeze(0) + o.keys[axis] - 1;
    };
    const at::Tensor down = along(0).view({o.window[0], 1, o.keys[0], 1}), across = along(1).unsqueeze(1);
    const at::Tensor index = down * offsets(o)[1] + across;
    return table.index_select(0, index.flatten()).view({area(o.window), area(o.keys), o.num_heads}).permute({2, 0, 1});
}

// Whether biases are a table that is spread for every query and key: those of small windows stay in a cache.
bool is_spread(const AttentionOptions& o) {
    constexpr int64_t kSmall = 64 * 64;
    return is_table(*o.bias) && area(o.window) * area(o.keys) <= kSmall;
}

// The same attention of transposed maps, with a table of biases.
AttentionOptions transposed(AttentionOptions o) {
    const auto [rows, columns] = offsets(o);
    for (auto* const sizes : {&o.window, &o.keys, &o.shift}) {
        std::swap((*sizes)[0], (*sizes)[1]);
    }
    o.bias = o.bias->reshape({rows, columns, o.num_heads}).transpose(0, 1).reshape({rows * columns, o.num_heads});
    return o;
}

void transpose(TokenGroups& groups) {
    std::swap(groups.vertical, groups.horizontal);
    groups.transposed = true;
}

// What a call has beside its maps, as the kernels read it.
struct Call {
    Call(GroupAttention& p, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const AttentionOptions& o,
         bool forward)
        : down((check(q, k, v, o), forward && runs_down(o))), biases(down ? transposed(o) : o, forward) {
        set_groups(p, o, q, k);
        if (down) {
            transpose(p.queries);
            transpose(p.keys);
        }
        p.bias = biases.params;
        if (o.temperature.has_value()) {
            temperature = o.temperature->to(at::kFloat).contiguous();
            p.temperature = temperature.const_data_ptr<float>();
        }
    }

    static void check(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const AttentionOptions& o) {
        check_image(q, "q");
        check_image(k, "k");
        check_tensor(k, "k", {q.size(0), q.size(1), k.size(2), k.size(3)}, q);
        check_tensor(v, "v", k.sizes(), q);
        check_attention(o, q, q.size(1));
    }
    // Whether tokens are taken down the windows: vectors read biases where these lie in a table, along its rows.
    static bool runs_down(const AttentionOptions& o) {
        return o.bias.has_value() && is_table(*o.bias) && !is_spread(o) && o.window[0] > o.window[1];
    }

    bool down;
    SpreadBiases biases;
    at::Tensor temperature;
};

}  // namespace

AttentionOptions lattice_options(const OptionalTensor& bias_table, int64_t num_heads, int64_t grid_size,
                                 int64_t channels) {
    TORCH_CHECK_VALUE(grid_size >= 1, "grid_size must be at least 1; got ", grid_size);
    TORCH_CHECK_VALUE(num_heads >= 1, "num_heads must be at least 1; got ", num_heads);
    const double scale = 1.0 / std::sqrt(static_cast<double>(channels / num_heads));
    return {{true, num_heads, {grid_size, grid_size}, {grid_size, grid_size}, {0, 0}, scale}, bias_table, {}};
}

std::array<at::Tensor, 3> parts_of(const at::Tensor& qkv) {
    const int64_t channels = attention_channels(qkv);
    return {qkv.narrow(1, 0, channels), qkv.narrow(1, channels, channels), qkv.narrow(1, 2 * channels, channels)};
}

void check_attention(const AttentionOptions& o, const at::Tensor& like, int64_t channels) {
    TORCH_CHECK_VALUE(o.num_heads >= 1 && channels % o.num_heads == 0, "num_heads must divide the ", channels,
                      " channels; got ", o.num_heads);
    for (int axis = 0; axis < 2; ++axis) {
        TORCH_CHECK_VALUE(o.window[axis] >= 1 && o.keys[axis] >= 1, "windows must have at least one pixel");
        TORCH_CHECK_VALUE(o.shift[axis] >= 0 && o.shift[axis] < o.window[axis],
                          "shift must be smaller than window_size; got ", o.shift[axis]);
    }
    if (o.bias.has_value()) {
        const at::Tensor& bias = *o.bias;
        const char* const name = o.lattices ? "bias_table" : "bias";
        if (is_table(bias)) {
            check_tensor(bias, name, {area(offsets(o)), o.num_heads}, like, true);
        } else {
            check_tensor(bias, name, {o.num_heads, area(o.window), area(o.keys)}, like, true);
        }
    }
    if (o.temperature.has_value()) {
        TORCH_CHECK_VALUE(o.temperature->numel() == o.num_heads, "temperature must have one value for each of ",
                          o.num_heads, " heads; got shape ", o.temperature->sizes());
        check_tensor(*o.temperature, "temperature", o.temperature->sizes(), like, true);
    }
}

void set_groups(GroupAttention& p, const AttentionShape& o, const at::Tensor& queries, const at::Tensor& keys) {
    p.dtype = dtype_of(queries);
    p.brgemm = brgemm_of(p.dtype);
    p.batch = queries.size(0);
    p.heads = o.num_heads;
    p.depth = queries.size(1) / o.num_heads;
    p.scale = static_cast<float>(o.scale);
    TokenAxis of_queries[2], of_keys[2];
    bool beyond = false;
    for (int axis = 0; axis < 2; ++axis) {
        const int64_t size = queries.size(2 + axis), key_size = keys.size(2 + axis);
        if (o.lattices) {
            of_queries[axis] = of_keys[axis] = TokenAxis::lattices(size, o.window[axis]);
            continue;
        }
        const int64_t reduction = size / std::max<int64_t>(key_size, 1), window = o.window[axis];
        TORCH_CHECK_VALUE(
            key_size > 0 && key_size * reduction == size && window % reduction == 0 && o.shift[axis] % reduction == 0,
            "k must be smaller than q by a factor that divides window_size and shift; got ", keys.sizes(), " beside ",
            queries.sizes());
        const int64_t inner = window / reduction, margin = (o.keys[axis] - inner) / 2;
        TORCH_CHECK_VALUE(margin >= 0 && inner + 2 * margin == o.keys[axis],
                          "key_size must be as large as a window of keys, or larger by an even number; got ",
                          o.keys[axis]);
        of_queries[axis] = TokenAxis::windows(size, window, o.shift[axis]);
        of_keys[axis] = TokenAxis::windows(key_size, inner, o.shift[axis] / reduction, margin);
        beyond = beyond || margin > 0;
    }
    p.queries = {of_queries[0], of_queries[1], false, false};
    p.keys = {of_keys[0], of_keys[1], beyond, false};
}

SpreadBiases::SpreadBiases(const AttentionOptions& o, bool spread_tables) {
    if (!o.bias.has_value()) {
        return;
    }
    const bool table = is_table(*o.bias);
    const bool spread = !table || (spread_tables && is_spread(o));
    params = spread ? dense_layout(o) : table_layout(o);
    values = at::zeros({o.num_heads, params.size}, at::kFloat);
    const auto [rows, columns] = offsets(o);
    const at::Tensor given = !table   ? *o.bias
                             : spread ? dense_of(*o.bias, o)
                                      : o.bias->reshape({rows, columns, o.num_heads}).permute({2, 0, 1});
    elements(values, o, !spread).copy_(given).mul_(kLog2E);
    params.values = values.const_data_ptr<float>();
}

at::Tensor group_attention(const at::Tensor& q_, const at::Tensor& k_, const at::Tensor& v_,
                           const AttentionOptions& options) {
    GroupAttentionParams p{};
    const Call call(p, q_, k_, v_, options, true);
    const at::Tensor q = with_pixels(q_), k = with_pixels(k_), v = with_pixels(v_);
    at::Tensor out = empty_channels_last(q.sizes(), q);
    p.q = pixels_of(q);
    p.k = pixels_of(k);
    p.v = pixels_of(v);
    p.out = out.mutable_data_ptr();

    const GroupAttentionKernels& kernel = kernels_in_use<GroupAttentionKernels>();
    const int64_t items = p.batch * p.queries.count() * p.heads;
    const int64_t floats = round_up(scratch_size(p), kChannelPad);
    WorkSpace space;
    const int64_t scratch = space.add(at::get_num_threads() * floats * static_cast<int64_t>(sizeof(float)));
    space.allocate();
    const int64_t grain = std::max<int64_t>(1, kGrain / (4 * p.queries.most() * p.keys.most() * p.depth));
    at::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) {
        const ProductScope scope{p.brgemm};
        kernel.forward(p, begin, end, space.at<float>(scratch) + at::get_thread_num() * floats);
    });
    return out;
}

namespace {

// The sum over the windows that each pixel of a map is a key of: (B, rows, columns of windows, keys down, keys across,
// C) -> (B, C, H, W).
at::Tensor fold_windows(const at::Tensor& windows, const GroupAttention& p, const AttentionOptions& o) {
    const int64_t down = p.keys.vertical.groups, across = p.keys.horizontal.groups;
    const auto [rows, columns] = o.window;
    // How many windows a window's keys reach into, its own counted.
    const int64_t reach_down = (o.keys[0] + rows - 1) / rows, reach_across = (o.keys[1] + columns - 1) / columns;
    const at::Tensor sum =
        at::zeros({p.batch, (down + reach_down - 1) * rows, (across + reach_across - 1) * columns, p.heads * p.depth},
                  at::kFloat);
    for (int64_t i = 0; i < reach_down; ++i) {
        for (int64_t j = 0; j < reach_across; ++j) {
            const int64_t height = std::min(rows, o.keys[0] - i * rows),
                          width = std::min(columns, o.keys[1] - j * columns);
            const at::Tensor part = windows.narrow(3, i * rows, height).narrow(4, j * columns, width);
            const at::Tensor target = sum.narrow(1, i * rows, down * rows).narrow(2, j * columns, across * columns);
            // (B, down, rows, across, columns, C)
            target.unflatten(2, {across, columns})
                .unflatten(1, {down, rows})
                .narrow(2, 0, height)
                .narrow(4, 0, width)
                .add_(part.permute({0, 1, 3, 2, 4, 5}));
        }
    }
    const at::Tensor inside = sum.narrow(1, -p.keys.vertical.start, p.keys.vertical.size)
                                  .narrow(2, -p.keys.horizontal.start, p.keys.horizontal.size);
    return inside.permute({0, 3, 1, 2});
}

// Shares of the groups, in which sums are made, whatever the number of threads.
int64_t shares_of(const GroupAttention& p, int64_t groups) {
    constexpr int64_t kTasks = 64, kMostSums = 1 << 22;
    const int64_t most = std::max<int64_t>(1, kMostSums / std::max<int64_t>(1, p.heads * p.bias.size));
    return std::max<int64_t>(1, std::min({kTasks, groups, most}));
}

}  // namespace

AttentionGradients group_attention_backward(const at::Tensor& grad_, const at::Tensor& q_, const at::Tensor& k_,
                                            const at::Tensor& v_, const AttentionOptions& options, bool as_one) {
    GroupAttentionGradients p{};
    const Call call(p, q_, k_, v_, options, false);
    check_tensor(grad_, "grad", q_.sizes(), q_);
    const at::Tensor q = with_pixels(q_), k = with_pixels(k_), v = with_pixels(v_), grad = channels_last(grad_);
    const int64_t channels = q.size(1), groups = p.batch * p.queries.count();
    p.q = pixels_of(q);
    p.k = pixels_of(k);
    p.v = pixels_of(v);
    p.grad = pixels_of(grad);
    p.of_windows = p.keys.whole;

    AttentionGradients found;
    at::Tensor windows;
    if (as_one) {
        found.qkv = empty_channels_last({p.batch, 3 * channels, q.size(2), q.size(3)}, q);
        found.q = found.qkv.narrow(1, 0, channels);
        found.k = found.qkv.narrow(1, channels, channels);
        found.v = found.qkv.narrow(1, 2 * channels, channels);
    } else {
        found.q = empty_channels_last(q.sizes(), q);
        if (!p.of_windows) {
            found.k = empty_channels_last(k.sizes(), k);
            found.v = empty_channels_last(k.sizes(), k);
        }
    }
    if (p.of_windows) {
        windows = at::empty(
            {2, p.batch, p.keys.vertical.groups, p.keys.horizontal.groups, options.keys[0], options.keys[1], channels},
            at::kFloat);
    }
    p.grad_q = found.q.mutable_data_ptr();
    p.grad_step = found.q.stride(3);
    p.grad_k = p.of_windows ? windows[0].mutable_data_ptr() : found.k.mutable_data_ptr();
    p.grad_v = p.of_windows ? windows[1].mutable_data_ptr() : found.v.mutable_data_ptr();

    const int64_t shares = shares_of(p, groups), heads = p.heads;
    const bool has_bias = options.bias.has_value();
    const at::Tensor of_bias = at::zeros({has_bias ? shares : 0, heads, p.bias.size}, at::kDouble);
    const at::Tensor of_temperature = at::zeros({shares, heads}, at::kDouble);
    const GroupAttentionSums sums{has_bias ? of_bias.mutable_data_ptr<double>() : nullptr,
                                  of_temperature.mutable_data_ptr<double>()};

    const GroupAttentionBackwardKernels& kernel = kernels_in_use<GroupAttentionBackwardKernels>();
    const int64_t floats = round_up(scratch_size(p), kChannelPad);
    WorkSpace space;
    const int64_t scratch = space.add(at::get_num_threads() * floats * static_cast<int64_t>(sizeof(float)));
    space.allocate();
    at::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
        const ProductScope scope{p.brgemm};
        for (int64_t i = begin; i < end; ++i) {
            kernel.backward(p, i * groups / shares, (i + 1) * groups / shares,
                            space.at<float>(scratch) + at::get_thread_num() * floats,
                            {has_bias ? sums.bias + i * heads * p.bias.size : nullptr, sums.temperature + i * heads});
        }
    });
    if (p.of_windows) {
        found.k = fold_windows(windows[0], p, options).to(k.scalar_type());
        found.v = fold_windows(windows[1], p, options).to(k.scalar_type());
    }
    found.bias = found.temperature = at::empty({0}, at::kFloat);
    if (options.temperature.has_value()) {
        found.temperature = of_temperature.sum(0).view(options.temperature->sizes()).to(options.temperature->dtype());
    }
    if (has_bias) {
        at::Tensor sum = elements(of_bias.sum(0), options, is_table(*options.bias));
        if (is_table(*options.bias)) {
            sum = sum.permute({1, 2, 0});
        }
        found.bias = sum.reshape(options.bias->sizes()).to(options.bias->scalar_type());
    }
    return found;
}

}  // namespace ipt_fast::cpu
