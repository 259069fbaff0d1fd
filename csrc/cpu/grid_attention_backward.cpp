// The backward of grid_attention: work partition and registration. The arithmetic is in
// grid_attention_backward_kernel.cpp.
#include <torch/library.h>

#include <algorithm>

#include "grid_attention_call.h"

namespace ipt_fast::cpu {

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

    const GridAttentionBackwardKernels& kernel = kernels_in_use<GridAttentionBackwardKernels>();
    const int64_t floats = round_up(scratch_size(p), kChannelPad);
    WorkSpace space;
    const int64_t scratch = space.add(at::get_num_threads() * floats * static_cast<int64_t>(sizeof(float)));
    space.allocate();
    at::parallel_for(0, num_heads * shares, 1, [&](int64_t begin, int64_t end) {
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

TORCH_LIBRARY_IMPL(ipt_fast_cpu, CPU, m) { m.impl("grid_attention_backward", grid_attention_backward); }

}  // namespace ipt_fast::cpu
