#include "merge.cuh"

#include <tuple>

#include "bindings.cuh"

namespace ipt_fast::cuda {
namespace {

void check_pair(const Tensor& first, const Tensor& second) {
    check_float(first, "first");
    STD_TORCH_CHECK(first.dim() == 4 && second.dim() == 4, "first and second must be pointwise weights; got ",
                    first.dim(), " and ", second.dim(), " dimensions");
    check_tensor(first, "first", {second.size(1), first.size(1), 1, 1}, first);
    check_tensor(second, "second", {second.size(0), first.size(0), 1, 1}, first);
}

void check_triple(const Tensor& k5, const Tensor& k3, const Tensor& k1) {
    check_float(k5, "k5");
    STD_TORCH_CHECK(k5.dim() == 4, "k5 must be a depthwise weight; got ", k5.dim(), " dimensions");
    check_tensor(k5, "k5", {k5.size(0), 1, 5, 5}, k5);
    check_tensor(k3, "k3", {k5.size(0), 1, 3, 3}, k5);
    check_tensor(k1, "k1", {k5.size(0), 1, 1, 1}, k5);
}

// An operand of a product: its element (i, j) is at i * row + j * column.
struct Operand {
    const void* data;
    int64_t row, column;
};
Operand matrix(const Tensor& weight) { return {weight.data_ptr(), weight.size(1), 1}; }
Operand transposed(const Tensor& weight) { return {weight.data_ptr(), 1, weight.size(1)}; }

Product product(Operand a, Operand b, Tensor& y, int64_t inner) {
    return {a.data, b.data, y.data_ptr(), (int)y.size(0), (int)y.size(1), (int)inner, a.row, a.column, b.row, b.column};
}

void run(const MergeArguments& arguments, const Tensor& like) {
    const Device device(like);
    with_type(like, [&](auto type) { merge<decltype(type)>(arguments, device.stream); });
}

Tensor merge_pointwise(Tensor first, Tensor second, bool tf32) {
    check_pair(first, second);
    check_device({&first, &second});
    Tensor merged = new_tensor(first, {second.size(0), first.size(1), 1, 1}, first.scalar_type());
    MergeArguments arguments = {};
    arguments.tf32 = tf32;
    arguments.products[0] = product(matrix(second), matrix(first), merged, first.size(0));
    run(arguments, first);
    return merged;
}

std::tuple<Tensor, Tensor> merge_pointwise_backward(Tensor grad, Tensor first, Tensor second, bool tf32) {
    check_pair(first, second);
    check_tensor(grad, "grad", {second.size(0), first.size(1), 1, 1}, first);
    check_device({&first, &second, &grad});
    Tensor grad_first = torch::stable::empty_like(first), grad_second = torch::stable::empty_like(second);
    MergeArguments arguments = {};
    arguments.tf32 = tf32;
    arguments.products[0] = product(transposed(second), matrix(grad), grad_first, second.size(0));
    arguments.products[1] = product(matrix(grad), transposed(first), grad_second, first.size(1));
    run(arguments, first);
    return {grad_first, grad_second};
}

Tensor merge_depthwise(Tensor k5, Tensor k3, Tensor k1, bool identity, bool /* tf32 */) {
    check_triple(k5, k3, k1);
    check_device({&k5, &k3, &k1});
    Tensor merged = new_tensor(k5, {k5.size(0), 1, 5, 5}, k5.scalar_type());
    MergeArguments arguments = {};
    arguments.sum = {merged.data_ptr(), k5.data_ptr(), k3.data_ptr(), k1.data_ptr(), (int)k5.size(0), identity, false};
    run(arguments, k5);
    return merged;
}

std::tuple<Tensor, Tensor, Tensor> merge_depthwise_backward(Tensor grad, Tensor k5, Tensor k3, Tensor k1,
                                                            bool /* identity */, bool /* tf32 */) {
    check_triple(k5, k3, k1);
    check_tensor(grad, "grad", {k5.size(0), 1, 5, 5}, k5);
    check_device({&k5, &k3, &k1, &grad});
    Tensor grad_k5 = torch::stable::empty_like(k5), grad_k3 = torch::stable::empty_like(k3);
    Tensor grad_k1 = torch::stable::empty_like(k1);
    MergeArguments arguments = {};
    arguments.sum = {
        grad.data_ptr(), grad_k5.data_ptr(), grad_k3.data_ptr(), grad_k1.data_ptr(), (int)k5.size(0), false, true};
    run(arguments, k5);
    return {grad_k5, grad_k3, grad_k1};
}

}  // namespace
}  // namespace ipt_fast::cuda

STABLE_TORCH_LIBRARY_IMPL(ipt_fast_cuda, CompositeExplicitAutograd, m) {
    m.impl("merge_pointwise", TORCH_BOX(&ipt_fast::cuda::merge_pointwise));
    m.impl("merge_pointwise_backward", TORCH_BOX(&ipt_fast::cuda::merge_pointwise_backward));
    m.impl("merge_depthwise", TORCH_BOX(&ipt_fast::cuda::merge_depthwise));
    m.impl("merge_depthwise_backward", TORCH_BOX(&ipt_fast::cuda::merge_depthwise_backward));
}
