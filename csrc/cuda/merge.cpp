#include "merge.h"

#include "tensor.h"

namespace ipt_fast {
namespace {

using Tensors = std::vector<Tensor>;

void check_counts(const Tensors& first, const Tensors& second, const Tensors& k5, const Tensors& k3, const Tensors& k1,
                  int products) {
    STD_TORCH_CHECK(first.size() == second.size() && (int)first.size() * products <= kMergeProducts,
                    "first and second must be at most ", kMergeProducts / products, " pairs");
    STD_TORCH_CHECK(k5.size() == k3.size() && k5.size() == k1.size() && (int)k5.size() <= kMergeSums,
                    "k5, k3 and k1 must be at most ", kMergeSums, " triples");
    STD_TORCH_CHECK(!first.empty() || !k5.empty(), "there is nothing to merge");
    check_float(first.empty() ? k5[0] : first[0], first.empty() ? "k5" : "first");
}

void check_pair(const Tensor& first, const Tensor& second, const Tensor& like) {
    STD_TORCH_CHECK(first.dim() == 4 && second.dim() == 4, "first and second must be pointwise weights");
    check_tensor(first, "first", {second.size(1), first.size(1), 1, 1}, like);
    check_tensor(second, "second", {second.size(0), first.size(0), 1, 1}, like);
    check_device({&like, &first, &second});
}

void check_triple(const Tensor& k5, const Tensor& k3, const Tensor& k1, const Tensor& like) {
    STD_TORCH_CHECK(k5.dim() == 4, "k5 must be a depthwise weight");
    check_tensor(k5, "k5", {k5.size(0), 1, 5, 5}, like);
    check_tensor(k3, "k3", {k5.size(0), 1, 3, 3}, like);
    check_tensor(k1, "k1", {k5.size(0), 1, 1, 1}, like);
    check_device({&like, &k5, &k3, &k1});
}

// (rows, columns) at x[i * row + j * column].
struct Matrix {
    const void* data;
    int64_t row, column;
};
Matrix matrix(const Tensor& weight) { return {weight.data_ptr(), weight.size(1), 1}; }
Matrix transposed(const Tensor& weight) { return {weight.data_ptr(), 1, weight.size(1)}; }

Product product(Matrix a, Matrix b, Tensor& y, int64_t inner) {
    return {a.data, b.data, y.data_ptr(), (int)y.size(0), (int)y.size(1), (int)inner, a.row, a.column, b.row, b.column};
}

void run(const MergeParams& params, const Tensor& like) {
    const Device device(like);
    with_type(like, [&](auto type) { merge<decltype(type)>(params, device.stream); });
}

// The merged weights: of every pair, then of every triple.
Tensors merge_branches(Tensors first, Tensors second, Tensors k5, Tensors k3, Tensors k1, bool identity, bool tf32) {
    check_counts(first, second, k5, k3, k1, 1);
    const Tensor like = first.empty() ? k5[0] : first[0];
    MergeParams params = {};
    params.tf32 = tf32;
    Tensors merged;
    for (size_t i = 0; i < first.size(); ++i) {
        check_pair(first[i], second[i], like);
        merged.push_back(new_tensor(like, {second[i].size(0), first[i].size(1), 1, 1}, like.scalar_type()));
        params.products[params.product_count++] =
            product(matrix(second[i]), matrix(first[i]), merged.back(), first[i].size(0));
    }
    for (size_t i = 0; i < k5.size(); ++i) {
        check_triple(k5[i], k3[i], k1[i], like);
        merged.push_back(new_tensor(like, {k5[i].size(0), 1, 5, 5}, like.scalar_type()));
        params.sums[params.sum_count++] = {merged.back().data_ptr(),
                                           k5[i].data_ptr(),
                                           k3[i].data_ptr(),
                                           k1[i].data_ptr(),
                                           (int)k5[i].size(0),
                                           identity,
                                           false};
    }
    run(params, like);
    return merged;
}

// Gradients of every first, second, k5, k3, k1, from those of what merge_branches returned.
Tensors merge_branches_backward(Tensors grads, Tensors first, Tensors second, Tensors k5, Tensors k3, Tensors k1,
                                bool tf32) {
    check_counts(first, second, k5, k3, k1, 2);
    STD_TORCH_CHECK(grads.size() == first.size() + k5.size(), "grads must be one for each merged weight");
    const Tensor like = first.empty() ? k5[0] : first[0];
    MergeParams params = {};
    params.tf32 = tf32;
    Tensors firsts, seconds, k5s, k3s, k1s;
    for (size_t i = 0; i < first.size(); ++i) {
        check_pair(first[i], second[i], like);
        check_tensor(grads[i], "grads", {second[i].size(0), first[i].size(1), 1, 1}, like);
        check_device({&like, &grads[i]});
        firsts.push_back(torch::stable::empty_like(first[i]));
        seconds.push_back(torch::stable::empty_like(second[i]));
        params.products[params.product_count++] =
            product(transposed(second[i]), matrix(grads[i]), firsts.back(), second[i].size(0));
        params.products[params.product_count++] =
            product(matrix(grads[i]), transposed(first[i]), seconds.back(), first[i].size(1));
    }
    for (size_t i = 0; i < k5.size(); ++i) {
        check_triple(k5[i], k3[i], k1[i], like);
        const Tensor& grad = grads[first.size() + i];
        check_tensor(grad, "grads", {k5[i].size(0), 1, 5, 5}, like);
        check_device({&like, &grad});
        k5s.push_back(torch::stable::empty_like(k5[i]));
        k3s.push_back(torch::stable::empty_like(k3[i]));
        k1s.push_back(torch::stable::empty_like(k1[i]));
        params.sums[params.sum_count++] = {grad.data_ptr(),
                                           k5s.back().data_ptr(),
                                           k3s.back().data_ptr(),
                                           k1s.back().data_ptr(),
                                           (int)k5[i].size(0),
                                           false,
                                           true};
    }
    run(params, like);
    Tensors all;
    for (const Tensors& some : {firsts, seconds, k5s, k3s, k1s}) {
        all.insert(all.end(), some.begin(), some.end());
    }
    return all;
}

}  // namespace
}  // namespace ipt_fast

STABLE_TORCH_LIBRARY_FRAGMENT(ipt_fast_cuda, m) {
    m.def(
        "merge_branches(Tensor[] first, Tensor[] second, Tensor[] k5, Tensor[] k3, Tensor[] k1, bool identity, "
        "bool tf32) -> Tensor[]");
    m.def(
        "merge_branches_backward(Tensor[] grads, Tensor[] first, Tensor[] second, Tensor[] k5, Tensor[] k3, "
        "Tensor[] k1, bool tf32) -> Tensor[]");
}
STABLE_TORCH_LIBRARY_IMPL(ipt_fast_cuda, CompositeExplicitAutograd, m) {
    m.impl("merge_branches", TORCH_BOX(&ipt_fast::merge_branches));
    m.impl("merge_branches_backward", TORCH_BOX(&ipt_fast::merge_branches_backward));
}
