// merge_pointwise and merge_depthwise with their backwards. The products of matrices are in merge_kernel.cpp.
#include "ipt_fast/merge.h"

#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "tensor.h"

namespace ipt_fast {
namespace {

void check_weight(const at::Tensor& w, const char* name) {
    const auto dtype = w.scalar_type();
    TORCH_CHECK_VALUE(w.dim() == 4 && w.numel() > 0, name, " has shape ", w.sizes(),
                      ", expected the weight of a convolution");
    TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf, name, " has dtype ", dtype,
                     ", expected Float, BFloat16 or Half");
    TORCH_CHECK_VALUE(w.is_cpu(), name, " is on ", w.device(), ", expected cpu");
}

// As fp32, with its rows or its columns contiguous.
at::Tensor as_matrix(const at::Tensor& matrix) {
    const at::Tensor wide = matrix.to(at::kFloat);
    return wide.stride(0) == 1 || wide.stride(1) == 1 ? wide : wide.contiguous();
}

// The product of two matrices in fp32, rounded once to their dtype: the weight of a pointwise convolution.
at::Tensor multiply(const at::Tensor& left_, const at::Tensor& right_) {
    const at::Tensor left = as_matrix(left_), right = as_matrix(right_);
    const at::Tensor out = at::empty({left.size(0), right.size(1), 1, 1}, left_.options());
    MergeParams p{};
    p.dtype = dtype_of(left_);
    p.rows = left.size(0);
    p.columns = right.size(1);
    p.depth = left.size(1);
    p.left = left.const_data_ptr<float>();
    p.left_row = left.stride(0);
    p.left_depth = left.stride(1);
    p.right = right.const_data_ptr<float>();
    p.right_row = right.stride(0);
    p.right_column = right.stride(1);
    p.out = out.mutable_data_ptr();

    // A multiple of the products' register tiles, few enough for the second cache.
    const int64_t threads = at::get_num_threads();
    p.block_rows = std::min<int64_t>(round_up((p.rows + threads - 1) / threads, 12), 192);

    WorkSpace space;
    const int64_t packed = space.add(padded(p.columns) * p.depth * sizeof(float));
    const int64_t scratch_size = merge_scratch(p) * sizeof(float);
    const int64_t scratch = space.add(threads * scratch_size);
    space.allocate();
    p.packed = space.at<float>(packed);
    const MergeKernels& kernel = IPT_FAST_KERNELS(merge);
    constexpr int64_t kGrain = 1 << 19;  // FMAs; fewer are not worth a thread
    const int64_t panels = (p.columns + kMergeColumns - 1) / kMergeColumns;
    const int64_t blocks = (p.rows + p.block_rows - 1) / p.block_rows, total = p.rows * p.columns * p.depth;
    at::parallel_for(0, panels, std::max<int64_t>(1, panels * kGrain / total), [&](int64_t begin, int64_t end) {
        for (int64_t panel = begin; panel < end; ++panel) {
            kernel.pack(p, panel * kMergeColumns);
        }
    });
    at::parallel_for(0, blocks, std::max<int64_t>(1, blocks * kGrain / total), [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) {
            kernel.multiply(p, block * p.block_rows, space.at<float>(scratch + at::get_thread_num() * scratch_size));
        }
    });
    return out;
}

void check_pointwise(const at::Tensor& first, const at::Tensor& second) {
    check_weight(first, "first");
    check_weight(second, "second");
    check_tensor(first, "first", {first.size(0), first.size(1), 1, 1}, first);
    check_tensor(second, "second", {second.size(0), first.size(0), 1, 1}, first);
}

at::Tensor merge_pointwise(const at::Tensor& first, const at::Tensor& second) {
    check_pointwise(first, second);
    return multiply(second.flatten(1), first.flatten(1));
}

std::tuple<at::Tensor, at::Tensor> merge_pointwise_backward(const at::Tensor& grad, const at::Tensor& first,
                                                            const at::Tensor& second) {
    check_pointwise(first, second);
    check_tensor(grad, "grad", {second.size(0), first.size(1), 1, 1}, first);
    const at::Tensor g = grad.flatten(1);
    return {multiply(second.flatten(1).t(), g), multiply(g, first.flatten(1).t())};
}

void check_depthwise(const at::Tensor& k5, const at::Tensor& k3, const at::Tensor& k1) {
    check_weight(k5, "k5");
    check_tensor(k5, "k5", {k5.size(0), 1, 5, 5}, k5);
    check_tensor(k3, "k3", {k5.size(0), 1, 3, 3}, k5);
    check_tensor(k1, "k1", {k5.size(0), 1, 1, 1}, k5);
}

// The middle size x size values of 5x5 kernels.
at::Tensor middle(const at::Tensor& kernels, int64_t size) {
    const int64_t first = (5 - size) / 2;
    return kernels.narrow(2, first, size).narrow(3, first, size);
}

at::Tensor merge_depthwise(const at::Tensor& k5, const at::Tensor& k3, const at::Tensor& k1, bool identity) {
    check_depthwise(k5, k3, k1);
    at::Tensor sum = k5.to(k5.options().dtype(at::kFloat), false, true, at::MemoryFormat::Contiguous);
    middle(sum, 3).add_(k3);
    middle(sum, 1).add_(k1.to(at::kFloat).add(identity ? 1 : 0));
    return sum.to(k5.scalar_type());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> merge_depthwise_backward(const at::Tensor& grad, const at::Tensor& k5,
                                                                        const at::Tensor& k3, const at::Tensor& k1,
                                                                        bool) {
    check_depthwise(k5, k3, k1);
    check_tensor(grad, "grad", k5.sizes(), k5);
    const auto copy = [&](int64_t size) { return middle(grad, size).clone(at::MemoryFormat::Contiguous); };
    return {copy(5), copy(3), copy(1)};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ipt_fast_cpu, m) {
    m.def("merge_pointwise(Tensor first, Tensor second) -> Tensor");
    m.def("merge_pointwise_backward(Tensor grad, Tensor first, Tensor second) -> (Tensor, Tensor)");
    m.def("merge_depthwise(Tensor k5, Tensor k3, Tensor k1, bool identity) -> Tensor");
    m.def(
        "merge_depthwise_backward(Tensor grad, Tensor k5, Tensor k3, Tensor k1, bool identity) "
        "-> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(ipt_fast_cpu, CPU, m) {
    m.impl("merge_pointwise", merge_pointwise);
    m.impl("merge_pointwise_backward", merge_pointwise_backward);
    m.impl("merge_depthwise", merge_depthwise);
    m.impl("merge_depthwise_backward", merge_depthwise_backward);
}

}  // namespace ipt_fast
