// grid_attention and its backward: checks, work partition, registration. The arithmetic is in
// grid_attention_kernel.cpp.
#include "grid_attention.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "level.h"
#include "matrix_unit.h"
#include "work_space.h"

namespace ipt_fast::cpu {
namespace {

// Fewer FLOP than this are not worth a thread.
constexpr int64_t kGrain = 1 << 20;

}  // namespace

void set_lattice(GridAttention& p, const at::Tensor& map, int64_t channels, int64_t num_heads, int64_t grid_size) {
    p.dtype = dtype_of(map);
    p.brgemm = brgemm_of(p.dtype);
    p.lattice = {map.size(2), map.size(3), grid_size};
    p.batch = map.size(0);
    p.heads = num_heads;
    p.depth = channels / num_heads;
    p.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(p.depth)));
}

at::Tensor spread_biases(const GridAttention& p, const OptionalTensor& table) {
    const int64_t rows = bias_rows(p);
    const at::Tensor out = at::zeros({p.heads, rows, bias_row(p)}, at::kFloat);
    if (table.has_value()) {
        out.narrow(2, 0, rows).copy_(table->reshape({rows, rows, p.heads}).permute({2, 0, 1})).mul_(kLog2E);
    }
    return out;
}

void check_attention(const at::Tensor& like, int64_t channels, const OptionalTensor& bias_table, int64_t num_heads,
                     int64_t grid_size) {
    TORCH_CHECK_VALUE(num_heads >= 1 && channels % num_heads == 0, "num_heads must divide the ", channels,
                      " channels; got ", num_heads);
    TORCH_CHECK_VALUE(grid_size >= 1, "grid_size must be at least 1; got ", grid_size);
    if (bias_table.has_value()) {
        const int64_t rows = (2 * grid_size - 1) * (2 * grid_size - 1);
        check_tensor(*bias_table, "bias_table", {rows, num_heads}, like, true);
    }
}

int64_t finest_grid(const at::Tensor& map, const OptionalTensor& bias_table, int64_t grid_size) {
    return bias_table.has_value() ? grid_size : std::min(grid_size, std::max(map.size(2), map.size(3)));
}

at::Tensor set_attention(GridAttention& p, const at::Tensor& map, int64_t channels, const OptionalTensor& bias_table,
                         int64_t num_heads, int64_t grid_size) {
    check_attention(map, channels, bias_table, num_heads, grid_size);
    set_lattice(p, map, channels, num_heads, finest_grid(map, bias_table, grid_size));
    at::Tensor bias = spread_biases(p, bias_table);
    p.bias = bias.const_data_ptr<float>();
    return bias;
}

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
        const ProductScope scope{p.brgemm};
        kernel.forward(p, begin, end, space.at<float>(scratch) + at::get_thread_num() * floats);
    });
    return out;
}

std::tuple<at::Tensor, at::Tensor> grid_attention_backward(const at::Tensor& grad, const at::Tensor& qkv,
                                                           const OptionalTensor& bias_table, int64_t num_heads,
                                                           int64_t grid_size) {
    check_image(qkv, "qkv");
    const int64_t channels = attention_channels(qkv);
    GridAttentionGradients p{};
    const at::Tensor bias = set_attention(p, qkv, channels, bias_table, num_heads, grid_size);
    check_tensor(grad, "grad", {p.batch, channels, qkv.size(2), qkv.size(3)}, qkv);
    const at::Tensor map = channels_last(qkv), grad_map = channels_last(grad);
    at::Tensor grad_qkv = empty_channels_last(qkv.sizes(), qkv);
    p.qkv = map.const_data_ptr();
    p.grad = grad_map.const_data_ptr();
    p.grad_qkv = grad_qkv.mutable_data_ptr();

    // The bias table's gradient is summed in fixed shares of the groups, whatever the number of threads.
    const int64_t groups = p.batch * group_count(p.lattice);
    const int64_t shares = std::min(groups, std::max<int64_t>(1, 64 / num_heads));
    const bool has_table = bias_table.has_value();
    const at::Tensor sums = at::zeros({has_table ? num_heads : 0, shares, bias_rows(p), bias_row(p)}, at::kDouble);
    double* const grad_bias = has_table ? sums.mutable_data_ptr<double>() : nullptr;

    const GridAttentionKernels& kernel = kernels_in_use<GridAttentionKernels>();
    const int64_t floats = round_up(scratch_size(p), kChannelPad);
    WorkSpace space;
    const int64_t scratch = space.add(at::get_num_threads() * floats * static_cast<int64_t>(sizeof(float)));
    space.allocate();
    at::parallel_for(0, num_heads * shares, 1, [&](int64_t begin, int64_t end) {
        const ProductScope scope{p.brgemm};
        for (int64_t k = begin; k < end; ++k) {
            const int64_t head = k / shares, share = k % shares;
            kernel.backward(p, head, share * groups / shares, (share + 1) * groups / shares,
                            space.at<float>(scratch) + at::get_thread_num() * floats,
                            grad_bias == nullptr ? nullptr : grad_bias + k * bias_size(p));
        }
    });
    if (!bias_table.has_value()) {
        return {grad_qkv, at::empty({0}, at::kFloat)};
    }
    const at::Tensor grad_table = sums.sum(1).narrow(2, 0, bias_rows(p)).permute({1, 2, 0});
    return {grad_qkv, grad_table.reshape(bias_table->sizes()).to(bias_table->scalar_type())};
}

TORCH_LIBRARY_IMPL(ipt_fast_cpu, CPU, m) {
    m.impl("grid_attention", grid_attention);
    m.impl("grid_attention_backward", grid_attention_backward);
}

}  // namespace ipt_fast::cpu
