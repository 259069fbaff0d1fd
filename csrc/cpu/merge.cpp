// merge_pointwise and merge_depthwise with their backwards: products of matrices are PyTorch's, which nothing of ours
// beat, and the kernels of a depthwise convolution are so small that the calls are what counts.
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "arguments.h"

namespace ipt_fast::cpu {
namespace {

void check_weight(const at::Tensor& w, const char* name) {
    TORCH_CHECK_VALUE(w.dim() == 4 && w.numel() > 0, name, " must be the weight of a convolution; got shape ",
                      w.sizes());
    check_dtype_and_device(w, name);
}

// left right in fp32, rounded once to their dtype: the weight of a pointwise convolution.
at::Tensor multiply(const at::Tensor& left, const at::Tensor& right) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const at::Tensor product = at::mm(left.to(at::kFloat), right.to(at::kFloat));
    return product.to(left.scalar_type()).view({left.size(0), right.size(1), 1, 1});
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

// body(value of the storage type)
template <typename Body>
void with_type(at::ScalarType dtype, const Body& body) {
    switch (dtype) {
        case at::kFloat:
            return body(float{});
        case at::kBFloat16:
            return body(at::BFloat16{});
        default:
            return body(at::Half{});
    }
}

at::Tensor merge_depthwise(const at::Tensor& k5, const at::Tensor& k3, const at::Tensor& k1, bool identity) {
    check_depthwise(k5, k3, k1);
    const at::Tensor large = k5.contiguous(), small = k3.contiguous(), centre = k1.contiguous();
    at::Tensor out = at::empty(k5.sizes(), k5.options());
    with_type(k5.scalar_type(), [&]<typename T>(T) {
        const T *from5 = large.const_data_ptr<T>(), *from3 = small.const_data_ptr<T>(),
                *from1 = centre.const_data_ptr<T>();
        T* to = out.mutable_data_ptr<T>();
        for (int64_t i = 0; i < k5.size(0); ++i, from5 += 25, from3 += 9, to += 25) {
            float sums[25];
            std::copy(from5, from5 + 25, sums);
            for (int64_t tap = 0; tap < 9; ++tap) {
                sums[6 + tap / 3 * 5 + tap % 3] += from3[tap];
            }
            sums[12] += static_cast<float>(from1[i]) + (identity ? 1.0f : 0.0f);
            std::copy(sums, sums + 25, to);
        }
    });
    return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> merge_depthwise_backward(const at::Tensor& grad, const at::Tensor& k5,
                                                                        const at::Tensor& k3, const at::Tensor& k1,
                                                                        bool) {
    check_depthwise(k5, k3, k1);
    check_tensor(grad, "grad", k5.sizes(), k5);
    at::Tensor grad5 = grad.clone(at::MemoryFormat::Contiguous);
    at::Tensor grad3 = at::empty(k3.sizes(), k3.options()), grad1 = at::empty(k1.sizes(), k1.options());
    with_type(grad.scalar_type(), [&]<typename T>(T) {
        const T* from = grad5.const_data_ptr<T>();
        T *to3 = grad3.mutable_data_ptr<T>(), *to1 = grad1.mutable_data_ptr<T>();
        for (int64_t i = 0; i < k5.size(0); ++i, from += 25, to3 += 9) {
            for (int64_t tap = 0; tap < 9; ++tap) {
                to3[tap] = from[6 + tap / 3 * 5 + tap % 3];
            }
            to1[i] = from[12];
        }
    });
    return {grad5, grad3, grad1};
}

}  // namespace

TORCH_LIBRARY_IMPL(ipt_fast_cpu, CPU, m) {
    m.impl("merge_pointwise", merge_pointwise);
    m.impl("merge_pointwise_backward", merge_pointwise_backward);
    m.impl("merge_depthwise", merge_depthwise);
    m.impl("merge_depthwise_backward", merge_depthwise_backward);
}

}  // namespace ipt_fast::cpu
