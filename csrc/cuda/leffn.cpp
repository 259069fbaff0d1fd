#include "leffn.h"

#include "tensor.h"

namespace ipt_fast {
namespace {

Tensor leffn_layer(Tensor x, OptionalTensor norm_weight, OptionalTensor norm_bias, Tensor expand_weight,
                   Tensor depthwise_weight, Tensor project_weight, double eps, bool centered, bool residual,
                   bool tf32) {
    check_image(x, "x");
    const int64_t channels = x.size(1);
    STD_TORCH_CHECK(channels == 32 || channels == 48 || channels == 64 || channels == 96, "x has ", channels,
                    " channels, the kernel takes 32, 48, 64 or 96");
    STD_TORCH_CHECK(x.size(2) <= INT32_MAX && x.size(3) <= INT32_MAX, "x is too high or too wide");
    STD_TORCH_CHECK(expand_weight.dim() == 4, "expand_weight must be a pointwise weight");
    const int64_t hidden = expand_weight.size(0);
    STD_TORCH_CHECK(hidden > 0 && hidden % kLeffnHiddenStep == 0 && hidden <= INT32_MAX / channels,
                    "expand_weight makes ", hidden, " channels, the kernel takes multiples of ", kLeffnHiddenStep,
                    " up to ", INT32_MAX / channels);
    check_tensor(expand_weight, "expand_weight", {hidden, channels, 1, 1}, x);
    check_tensor(depthwise_weight, "depthwise_weight", {hidden, 1, 5, 5}, x);
    check_tensor(project_weight, "project_weight", {channels, hidden, 1, 1}, x);
    STD_TORCH_CHECK(norm_weight.has_value() || !norm_bias.has_value(), "norm_bias needs norm_weight");
    if (norm_weight.has_value()) {
        check_small(*norm_weight, "norm_weight", {channels}, x, *norm_weight);
    }
    if (norm_bias.has_value()) {
        check_small(*norm_bias, "norm_bias", {channels}, x, *norm_weight);
    }
    check_device({&x, &expand_weight, &depthwise_weight, &project_weight});
    for (const OptionalTensor* small : {&norm_weight, &norm_bias}) {
        if (small->has_value()) {
            check_device({&x, &**small});
        }
    }

    Tensor y = new_image(x, channels);
    LeffnParams params = {};
    params.x = x.data_ptr();
    params.norm_weight = values(norm_weight);
    params.norm_bias = values(norm_bias);
    params.narrow = norm_weight.has_value() && norm_weight->scalar_type() != ScalarType::Float;
    params.expand = expand_weight.data_ptr();
    params.depthwise = depthwise_weight.data_ptr();
    params.project = project_weight.data_ptr();
    params.y = y.data_ptr();
    params.batch = x.size(0);
    params.height = (int)x.size(2);
    params.width = (int)x.size(3);
    params.hidden = (int)hidden;
    params.eps = (float)eps;
    params.centered = centered;
    params.residual = residual;
    params.tf32 = tf32;
    const Device device(x);
    with_type(x, [&](auto type) { leffn<decltype(type)>(params, (int)channels, device.stream); });
    return y;
}

}  // namespace
}  // namespace ipt_fast

STABLE_TORCH_LIBRARY_FRAGMENT(ipt_fast_cuda, m) {
    m.def(
        "leffn_layer(Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor expand_weight, Tensor depthwise_weight, "
        "Tensor project_weight, float eps, bool centered, bool residual, bool tf32) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(ipt_fast_cuda, CompositeExplicitAutograd, m) {
    m.impl("leffn_layer", TORCH_BOX(&ipt_fast::leffn_layer));
}
