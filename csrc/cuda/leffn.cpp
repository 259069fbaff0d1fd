#include "leffn.cuh"

#include "bindings.cuh"

namespace ipt_fast::cuda {
namespace {

// Without a norm (`norm_weight` is absent) there is no residual either.
Tensor run(const Tensor& x, const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
           const Tensor& expand_weight, const Tensor& depthwise_weight, const Tensor& project_weight, double eps,
           bool centered, bool tf32) {
    check_image(x, "x");
    const int64_t channels = x.size(1);
    STD_TORCH_CHECK(channels == 32 || channels == 48 || channels == 64 || channels == 96,
                    "x must have 32, 48, 64 or 96 channels; got ", channels);
    STD_TORCH_CHECK(x.size(2) <= INT32_MAX && x.size(3) <= INT32_MAX, "x must have at most ", INT32_MAX,
                    " rows and columns; got ", x.size(2), " x ", x.size(3));
    STD_TORCH_CHECK(expand_weight.dim() == 4, "expand_weight must be (M, C, 1, 1); got ", expand_weight.dim(),
                    " dimensions");
    const int64_t hidden = expand_weight.size(0);
    STD_TORCH_CHECK(hidden > 0 && hidden % kLeffnHiddenStep == 0 && hidden <= INT32_MAX / channels,
                    "expand_weight must have a multiple of ", kLeffnHiddenStep, " outputs, at most ",
                    INT32_MAX / channels, "; got ", hidden);
    check_tensor(expand_weight, "expand_weight", {hidden, channels, 1, 1}, x);
    check_tensor(depthwise_weight, "depthwise_weight", {hidden, 1, 5, 5}, x);
    check_tensor(project_weight, "project_weight", {channels, hidden, 1, 1}, x);
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
    LeffnArguments arguments = {};
    arguments.x = x.data_ptr();
    arguments.norm_weight = values(norm_weight);
    arguments.norm_bias = values(norm_bias);
    arguments.narrow = norm_weight.has_value() && norm_weight->scalar_type() != ScalarType::Float;
    arguments.expand = expand_weight.data_ptr();
    arguments.depthwise = depthwise_weight.data_ptr();
    arguments.project = project_weight.data_ptr();
    arguments.y = y.data_ptr();
    arguments.batch = x.size(0);
    arguments.height = (int)x.size(2);
    arguments.width = (int)x.size(3);
    arguments.hidden = (int)hidden;
    arguments.eps = (float)eps;
    arguments.centered = centered;
    arguments.residual = norm_weight.has_value();
    arguments.tf32 = tf32;
    const Device device(x);
    with_type(x, [&](auto type) { leffn<decltype(type)>(arguments, (int)channels, device.stream); });
    return y;
}

Tensor run_leffn(Tensor x, Tensor expand_weight, Tensor depthwise_weight, Tensor project_weight, bool tf32) {
    return run(x, std::nullopt, std::nullopt, expand_weight, depthwise_weight, project_weight, 0, true, tf32);
}

Tensor run_leffn_layer(Tensor x, Tensor norm_weight, OptionalTensor norm_bias, Tensor expand_weight,
                       Tensor depthwise_weight, Tensor project_weight, double eps, bool centered, bool tf32) {
    return run(x, norm_weight, norm_bias, expand_weight, depthwise_weight, project_weight, eps, centered, tf32);
}

}  // namespace
}  // namespace ipt_fast::cuda

STABLE_TORCH_LIBRARY_IMPL(ipt_fast_cuda, CompositeExplicitAutograd, m) {
    m.impl("leffn", TORCH_BOX(&ipt_fast::cuda::run_leffn));
    m.impl("leffn_layer", TORCH_BOX(&ipt_fast::cuda::run_leffn_layer));
}
