// feed_forward_layer: registration of its forward.
#include <torch/library.h>

#include "feed_forward.h"

namespace ipt_fast::cpu {
namespace {

constexpr Layer kLayer = Layer::feed_forward_layer;

at::Tensor pack_feed_forward_layer(const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                                   const at::Tensor& expand_weight, const OptionalTensor& depthwise_weight,
                                   const at::Tensor& project_weight, std::string_view form,
                                   const OptionalTensor& expand_bias, const OptionalTensor& depthwise_bias,
                                   const OptionalTensor& project_bias, const OptionalTensor& inner_weight,
                                   const OptionalTensor& inner_bias, const OptionalTensor& gate, double eps,
                                   bool centered, double inner_eps) {
    const FeedForwardWeights w = weights_of_form(form, expand_weight, depthwise_weight, project_weight, expand_bias,
                                                 depthwise_bias, project_bias, inner_weight, inner_bias, inner_eps);
    return pack_layer(kLayer, norm_weight, norm_bias, w, gate, eps, centered);
}

at::Tensor feed_forward_layer_packed(const at::Tensor& x, const at::Tensor& packed, const OptionalTensor& norm_weight,
                                     const OptionalTensor& norm_bias, const OptionalTensor& gate) {
    return run_layer(kLayer, x, packed, norm_weight, norm_bias, gate);
}

at::Tensor feed_forward_layer(const at::Tensor& x, const at::Tensor& norm_weight, const OptionalTensor& norm_bias,
                              const at::Tensor& expand_weight, const OptionalTensor& depthwise_weight,
                              const at::Tensor& project_weight, std::string_view form,
                              const OptionalTensor& expand_bias, const OptionalTensor& depthwise_bias,
                              const OptionalTensor& project_bias, const OptionalTensor& inner_weight,
                              const OptionalTensor& inner_bias, const OptionalTensor& gate, double eps, bool centered,
                              double inner_eps) {
    const FeedForwardWeights w = weights_of_form(form, expand_weight, depthwise_weight, project_weight, expand_bias,
                                                 depthwise_bias, project_bias, inner_weight, inner_bias, inner_eps);
    w.check(x);
    const KeptLevel level;
    return run_layer(kLayer, x, pack_layer(kLayer, {}, {}, w, {}, eps, centered), norm_weight, norm_bias, gate);
}

}  // namespace

TORCH_LIBRARY_IMPL(ipt_fast_cpu, CPU, m) {
    m.impl("feed_forward_layer", feed_forward_layer);
    m.impl("pack_feed_forward_layer", pack_feed_forward_layer);
    m.impl("feed_forward_layer_packed", feed_forward_layer_packed);
}

}  // namespace ipt_fast::cpu
