// grid_attention: checks, work partition, registration. The arithmetic is in grid_attention_kernel.cpp.
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

#include "grid_attention_call.h"

namespace ipt_fast::cpu {
namespace {

// Fewer FLOP than this are not worth a thread.
constexpr int64_t kGrain = 1 << 20;

// (heads, bias_rows, bias_row) as described at GridAttention::bias.
at::Tensor spread(const GridAttention& p, const OptionalTensor& table) {
    const int64_t rows = bias_rows(p);
    const at::Tensor out = at::zeros({p.heads, rows, bias_row(p)}, at::kFloat);
    if (table.has_value()) {
        out.narrow(2, 0, rows).copy_(table->reshape({rows, rows, p.heads}).permute({2, 0, 1})).mul_(kLog2E);
    }
    return out;
}

}  // namespace

at::Tensor grid_attention(const at::Tensor& qkv, const OptionalTensor& bias_table, int64_t num_heads,
                          int64_t grid_size) {
    check_image(qkv, "qkv");
    const int64_t channels = attention_channels(qkv), height = qkv.size(2), width = qkv.size(3);
    GridAttentionParams p{};
    const at::Tensor bias = set_attention(p, qkv, channels, bias_table, num_heads, grid_size);
    const at::Tensor map = channels_last(qkv);
    at::Tensor out = empty_channels_last({p.batch, channels, height, width}, qkv);
    p.qkv = map.const_data_ptr();
    p.out = out.mutable_data_ptr();

    const GridAttentionKernels& kernel = kernels_in_use<GridAttentionKernels>();
    const int64_t tokens = most_tokens(p.lattice), items = p.batch * group_count(p.lattice) * p.heads;
    const int64_t floats = round_up(scratch_size(p), kChannelPad);
    WorkSpace space;
    const int64_t scratch = space.add(at::get_num_threads() * floats * static_cast<int64_t>(sizeof(float)));
    space.allocate();
    const int64_t grain = std::max<int64_t>(1, kGrain / (4 * tokens * tokens * p.depth));
    at::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) {
        kernel.forward(p, begin, end, space.at<float>(scratch) + at::get_thread_num() * floats);
    });
    return out;
}

at::Tensor set_attention(GridAttention& p, const at::Tensor& map, int64_t channels, const OptionalTensor& bias_table,
                         int64_t num_heads, int64_t grid_size) {
    TORCH_CHECK_VALUE(num_heads >= 1 && channels % num_heads == 0, "num_heads is ", num_heads,
                      ", expected a divisor of ", channels, " channels");
    TORCH_CHECK_VALUE(grid_size >= 1, "grid_size is ", grid_size, ", expected at least 1");
    if (bias_table.has_value()) {
        const int64_t rows = (2 * grid_size - 1) * (2 * grid_size - 1);
        check_tensor(*bias_table, "bias_table", {rows, num_heads}, map, true);
    }
    p.dtype = dtype_of(map);
    // Without a table the lattice need not be finer than the map.
    const int64_t finest = bias_table.has_value() ? grid_size : std::max(map.size(2), map.size(3));
    p.lattice = {map.size(2), map.size(3), std::min(grid_size, finest)};
    p.batch = map.size(0);
    p.heads = num_heads;
    p.depth = channels / num_heads;
    p.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(p.depth)));
    at::Tensor bias = spread(p, bias_table);
    p.bias = bias.const_data_ptr<float>();
    return bias;
}

TORCH_LIBRARY_IMPL(ipt_fast_cpu, CPU, m) { m.impl("grid_attention", grid_attention); }

}  // namespace ipt_fast::cpu
