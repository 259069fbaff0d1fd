#include "depthwise.h"

#include "tensor.h"

namespace ipt_fast {
namespace {

DepthwiseShape depthwise_shape(const Tensor& x) {
    check_image(x, "x");
    const int64_t channels = x.size(1);
    STD_TORCH_CHECK(channels % kDepthwiseStep == 0 && channels <= INT32_MAX / 32, "x has ", channels,
                    " channels, the kernel takes multiples of ", kDepthwiseStep);
    STD_TORCH_CHECK(x.size(2) < INT32_MAX / 2 && x.size(3) < INT32_MAX / 2, "x is too high or too wide");
    return {x.size(0), (int)x.size(2), (int)x.size(3), (int)channels};
}

void check_size(int64_t size) {
    STD_TORCH_CHECK(size == 3 || size == 5, "the weight is of ", size, " x ", size,
                    ", the kernel takes 3 x 3 and 5 x 5");
}

Tensor depthwise_forward(Tensor x, Tensor weight, bool flip) {
    const DepthwiseShape shape = depthwise_shape(x);
    STD_TORCH_CHECK(weight.dim() == 4, "weight must be a depthwise weight");
    const int64_t size = weight.size(3);
    check_size(size);
    check_tensor(weight, "weight", {x.size(1), 1, size, size}, x);
    check_device({&x, &weight});
    Tensor y = new_image(x, x.size(1));
    const Device device(x);
    const DepthwiseParams params = {x.data_ptr(), weight.data_ptr(), y.data_ptr(), shape, flip};
    with_type(x, [&](auto type) { depthwise<decltype(type)>(params, (int)size, device.stream); });
    return y;
}

Tensor depthwise_weight_gradient(Tensor grad, Tensor x, int64_t size) {
    const DepthwiseShape shape = depthwise_shape(x);
    check_image(grad, "grad");
    STD_TORCH_CHECK(grad.sizes() == x.sizes() && grad.scalar_type() == x.scalar_type(),
                    "grad must have the shape and the dtype of x");
    check_size(size);
    check_device({&x, &grad});
    int shares = 0;
    with_type(x, [&](auto type) { shares = depthwise_shares<decltype(type)>(shape); });
    Tensor sums = new_tensor(x, {shares, size * size, x.size(1)}, ScalarType::Float);
    Tensor gradient = new_tensor(x, {x.size(1), 1, size, size}, ScalarType::Float);
    const Device device(x);
    const DepthwiseGradientParams params = {grad.data_ptr(), x.data_ptr(), values<float>(sums), shape, shares};
    with_type(x, [&](auto type) {
        depthwise_gradient<decltype(type)>(params, values<float>(gradient), (int)size, device.stream);
    });
    return gradient;
}

}  // namespace
}  // namespace ipt_fast

STABLE_TORCH_LIBRARY_FRAGMENT(ipt_fast_cuda, m) {
    m.def("depthwise(Tensor x, Tensor weight, bool flip) -> Tensor");
    m.def("depthwise_weight_gradient(Tensor grad, Tensor x, int size) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(ipt_fast_cuda, CompositeExplicitAutograd, m) {
    m.impl("depthwise", TORCH_BOX(&ipt_fast::depthwise_forward));
    m.impl("depthwise_weight_gradient", TORCH_BOX(&ipt_fast::depthwise_weight_gradient));
}
