#include <ATen/ops/mv.h>

#include "leffn.h"

namespace ipt_fast::cpu {

void LeffnWeights::check() const {
    const int64_t channels = input_channels(expand, "expand_weight");
    TORCH_CHECK_VALUE(project.dim() == 4 && project.size(0) > 0, "project_weight must be (N, M, 1, 1); got shape ",
                      project.sizes());
    TORCH_CHECK_VALUE(depthwise.dim() == 4 && depthwise.size(2) % 2 == 1,
                      "depthwise_weight must be (M, 1, K, K) with odd K; got shape ", depthwise.sizes());
    const int64_t hidden = expand.size(0), kernel = depthwise.size(2);
    check_tensor(expand, "expand_weight", {hidden, channels, 1, 1}, expand);
    check_tensor(depthwise, "depthwise_weight", {hidden, 1, kernel, kernel}, expand);
    check_tensor(project, "project_weight", {project.size(0), hidden, 1, 1}, expand);
    const auto check_bias = [&](const OptionalTensor& bias, const char* name, int64_t channels) {
        if (bias.has_value()) {
            check_tensor(*bias, name, {channels}, expand, true);
        }
    };
    check_bias(expand_bias, "expand_bias", hidden);
    check_bias(depthwise_bias, "depthwise_bias", hidden);
    check_bias(project_bias, "project_bias", project.size(0));
}

void LeffnWeights::check(const at::Tensor& x) const {
    check_image(x, "x");
    check();
    check_tensor(expand, "expand_weight", {expand.size(0), x.size(1), 1, 1}, x);
}

OptionalTensor LeffnWeights::output_bias() const {
    if (!depthwise_bias.has_value()) {
        return wide(project_bias);
    }
    const at::Tensor projected = at::mv(wide(project).flatten(1), wide(*depthwise_bias));
    return project_bias.has_value() ? projected.add(wide(*project_bias)) : projected;
}

}  // namespace ipt_fast::cpu
